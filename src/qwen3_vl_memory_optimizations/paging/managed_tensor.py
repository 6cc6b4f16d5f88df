"""`ManagedTensor`: a `torch.Tensor` whose bytes the optimizer owns.

It replaces a parameter inside an unchanged transformers module. `F.linear` and `F.embedding` compute on the encoded
form. Any other operation runs on a decoded copy, or on the bytes themselves if they are stored unencoded; a view then
keeps them pinned for as long as it lives.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree

from ..compression import RawCodec, columns_of
from ..errors import ConfigurationError
from ..interrupts import shield
from .budget.ledger import PROCESS
from .frozen import frozen_linear, tracks
from .pager import Pager
from .products import Products
from .records.entry import PageState, TensorEntry

_Tensor = torch.Tensor

# Attributes and methods answered from metadata, without touching any byte.
_METADATA_ATTRIBUTES = (
    "shape dtype device layout requires_grad is_leaf grad grad_fn ndim names itemsize nbytes is_cpu is_cuda is_meta "
    "is_sparse is_sparse_csr is_quantized is_nested is_mkldnn is_mps is_xla is_xpu is_ipu is_hpu is_mtia is_vulkan "
    "is_maia _version _base output_nr retains_grad _backward_hooks"
).split()
_METADATA_METHODS = (
    "size dim numel nelement stride element_size is_floating_point is_complex storage_offset __len__ "
    "is_pinned get_device is_inference is_signed is_conj is_neg ndimension is_shared"
).split()
_METADATA = {
    *(getattr(_Tensor, name).__get__ for name in _METADATA_ATTRIBUTES if hasattr(_Tensor, name)),
    *(getattr(_Tensor, name) for name in _METADATA_METHODS if hasattr(_Tensor, name)),
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}
_COPIES = "copies of weights"
_FREEZES = {_Tensor.requires_grad_, _Tensor.requires_grad.__set__}  # type: ignore[attr-defined]
_ITSELF = {_Tensor.detach, _Tensor.data.__get__, torch.detach}  # type: ignore[attr-defined]


class ManagedTensor(torch.Tensor):
    """A tensor managed by a Pager. Created by `MemoryOptimizer`, not by its constructor.

    Attributes:
        pager: owner of the bytes.
        entry: the Pager's record of them.
    """

    pager: Pager
    entry: TensorEntry
    _owner: object

    @staticmethod
    def __new__(cls, pager: Pager, entry: TensorEntry) -> ManagedTensor:
        self: ManagedTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            entry.shape,
            dtype=entry.dtype,
        )
        self.pager, self.entry = pager, entry
        self._owner = pager.owner()
        self._is_param = entry.kind == "weights"  # read by `isinstance(weight, nn.Parameter)`
        return self

    @property
    def tensor_id(self) -> str:
        """The optimizer's name for the tensor."""
        return self.entry.tensor_id

    @property
    def kind(self) -> str:
        """`weights`, `kv_cache`, `vision_features`, `text_embeddings` or `general`."""
        return self.entry.kind

    @property
    def codec(self) -> str:
        """The name of its codec."""
        return self.entry.codec.name

    @property
    def tier(self) -> str:
        """`cpu` while every page is in memory, else `ssd`."""
        return "cpu" if all(page.state is PageState.RESIDENT for page in self.entry.pages) else "ssd"

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        entry = self.entry
        return (
            f"ManagedTensor({entry.tensor_id!r}, kind={entry.kind!r}, shape={tuple(entry.shape)}, dtype={entry.dtype}, "
            f"codec={entry.codec.name!r}, tier={self.tier!r})"
        )

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Dispatch an operation: on the encoded form, from metadata, or on the decoded tensor."""
        kwargs = kwargs or {}
        if func is F.linear:
            result = _linear(*args, **kwargs)
        elif func is F.embedding:
            result = _embedding(*args, **kwargs)
        elif func in _ITSELF and len(args) == 1 and not kwargs:
            return args[0]
        elif func is _Tensor.__getitem__ and args[1] is Ellipsis and type(args[0]) is ManagedTensor:
            return args[0]  # the whole tensor, so that writes reach it
        elif func in _FREEZES and isinstance(args[0], ManagedTensor):
            return _require_frozen(func, *args, **kwargs)
        elif func is _Tensor.data_ptr and isinstance(args[0], ManagedTensor):
            return args[0].entry.address if args[0]._has_no_bytes() else _values_of(args[0]).data_ptr()
        elif func is _Tensor.untyped_storage and isinstance(args[0], ManagedTensor) and args[0]._has_no_bytes():
            return args[0].entry.lease()[0].untyped_storage()  # only its address is meaningful
        elif func is _Tensor.is_contiguous and isinstance(args[0], ManagedTensor) and args[0]._has_no_bytes():
            return False
        elif func is _Tensor.contiguous and isinstance(args[0], ManagedTensor):
            return args[0].decoded()  # safetensors takes the address of this result and reads there later
        elif func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        else:
            result = NotImplemented
        return _run_decoded(func, args, kwargs) if result is NotImplemented else result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run operations that torch starts below its Python interface; they have no encoded form."""
        return _run_decoded(func, args, kwargs or {})

    def convert_(self, dtype: torch.dtype) -> None:
        """Present the tensor in another dtype from now on; the encoded form is unchanged."""
        with torch._C.DisableTorchFunctionSubclass():
            self.data = torch.Tensor._make_wrapper_subclass(ManagedTensor, self.entry.shape, dtype=dtype)
        self.entry.dtype = dtype

    def row_parts(self) -> Iterator[torch.Tensor]:
        """Yield the values in ranges of rows; each part is valid until the next is requested."""
        if self.entry.rows_per_page is None:
            yield self.decoded()
            return
        for _, rows in self.pager.products.decoded_parts(self.entry, self.dtype):
            yield rows.view(-1, *self.shape[1:])

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """Return a plain copy of the values; for a weight, a frozen parameter."""
        if id(self) not in memo:
            copied = self._copied()
            memo[id(self)] = nn.Parameter(copied, requires_grad=False) if self.kind == "weights" else copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as a plain tensor with the values."""
        return self._copied().__reduce_ex__(protocol)

    def _has_no_bytes(self) -> bool:
        """Return whether no address holds its values, because they are encoded or may leave memory.

        Its address still distinguishes it from other tensors (PEFT compares them). It reports itself as non-contiguous,
        so that callers make it contiguous before reading; otherwise safetensors would save whatever is at the address.
        """
        entry = self.entry
        encoded = not isinstance(entry.codec, RawCodec)
        return bool(entry.pages) and (encoded or (entry.kind == "weights" and self.pager.ledger.limited))

    def _copied(self) -> torch.Tensor:
        """Return a plain copy of the values, charged to the budget while it is alive."""
        n_bytes = self.nbytes
        self.pager.debit(_COPIES, n_bytes, PROCESS)
        buffer = (ctypes.c_uint8 * n_bytes)()
        weakref.finalize(buffer, self.pager.debit_later, _COPIES, -n_bytes, PROCESS).atexit = False
        whole = torch.frombuffer(buffer, dtype=torch.uint8) if n_bytes else torch.empty(0, dtype=torch.uint8)
        copied, start = whole.view(self.dtype).view(self.shape), 0
        for part in self.row_parts():
            if part.shape == copied.shape:
                return copied.copy_(part)
            copied[start : start + len(part)] = part
            start += len(part)
        return copied

    def decoded(self) -> torch.Tensor:
        """Return a plain tensor with the values: the bytes themselves (pinned while it lives) or a decoded copy."""
        plain = _values_of(self)
        if self.entry.holds(_address(plain)):
            self.entry.mark_aliased()  # the caller may write to it
        return plain


def _require_frozen(func: Callable[..., Any], weight: ManagedTensor, requires_grad: bool = True) -> Any:
    if requires_grad:
        raise ConfigurationError(
            f"{weight.tensor_id}: managed weights are frozen, no gradient is computed for them; train an adapter "
            "(LoRA), or load the model with transformers"
        )
    return weight if func is _Tensor.requires_grad_ else None


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    if type(weight) is not ManagedTensor or type(input) is ManagedTensor or weight.entry.rows_per_page is None:
        return NotImplemented
    if not weight.entry.pages:
        return NotImplemented
    if type(bias) is ManagedTensor:
        bias = _values_of(bias)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        with torch.autocast("cpu", enabled=False):
            return _product_of(weight, input.to(dtype), None if bias is None else bias.to(dtype))
    return _product_of(weight, input, bias)


def _product_of(weight: ManagedTensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    products = weight.pager.products
    return (frozen_linear if tracks(x, bias) else Products.linear)(products, weight.entry, x, bias)


def linear_joined(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return `x @ W.T` for the rows of several matrices `[n, columns]`, concatenated: `[..., total n]`."""
    first = weights[0]
    if type(first) is ManagedTensor and type(x) is not ManagedTensor:
        entries = [weight.entry for weight in weights if type(weight) is ManagedTensor and weight.pager is first.pager]
        if len(entries) == len(weights) and all(entry.rows_per_page and entry.pages for entry in entries):
            return first.pager.products.linear_joined(entries, x)
    return torch.cat([F.linear(x, weight) for weight in weights], dim=-1)


Product = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def whole_linears(linears: Sequence[nn.Linear]) -> Iterator[list[Product] | None]:
    """Hold the weights of linear layers in memory for several products; counts as one access to each, in this order.

    Yields:
        For each layer a function that returns `x @ W.T + bias` for any rows `x`; `None` if the weights do not fit
        together, or one layer is not a plain `nn.Linear`, because its replacement may compute something else.
    """
    if any(type(linear) is not nn.Linear for linear in linears):
        yield None
        return
    weights: list[torch.Tensor] = [linear.weight for linear in linears]
    managed = [weight for weight in weights if type(weight) is ManagedTensor]
    usable = all(weight.entry.rows_per_page and weight.entry.pages for weight in managed)
    if not managed or not usable or any(weight.pager is not managed[0].pager for weight in managed):
        yield None if managed else [linear.forward for linear in linears]
        return
    pager = managed[0].pager
    with pager.products.whole([weight.entry for weight in managed]) as there:
        yield [_product(linear, pager) for linear in linears] if there else None  # the shield is up


def _product(linear: nn.Linear, pager: Pager) -> Product:
    weight: torch.Tensor = linear.weight
    bias: torch.Tensor | None = linear.bias
    if type(weight) is not ManagedTensor:
        return linear.forward
    plain = _values_of(bias) if type(bias) is ManagedTensor else bias
    entry = weight.entry
    return lambda x: pager.products.linear_of_whole(entry, x, plain)


def _embedding(
    input: torch.Tensor,
    weight: torch.Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if type(weight) is not ManagedTensor or type(input) is ManagedTensor or max_norm is not None:
        return NotImplemented
    entry = weight.entry
    if entry.rows_per_page is None or input.dtype not in (torch.int32, torch.int64):
        return NotImplemented
    rows, positions = torch.unique(input, return_inverse=True)
    if rows.numel() and not (0 <= int(rows[0]) and int(rows[-1]) < entry.shape[0]):
        raise IndexError(f"embedding index outside [0, {entry.shape[0]}): {int(rows[0])} to {int(rows[-1])}")
    encoded = weight.pager.read_rows(entry, rows)
    table = entry.codec.decode(encoded, torch.empty((len(rows), *entry.shape[1:]), dtype=entry.dtype))
    return table[positions]


def _values_of(managed: ManagedTensor) -> torch.Tensor:
    """Return the values: decoded, or for a raw codec an alias of the bytes, pinned while the alias lives."""
    pager, entry = managed.pager, managed.entry
    with shield:
        pager.pin(entry)
        data = next(iter(entry.encoded(0, entry.rows).values()))
        if isinstance(entry.codec, RawCodec) and data.dtype == entry.dtype:
            raw, buffer = entry.lease()
            weakref.finalize(buffer, pager.unpin_later, entry)
            return raw.view(entry.dtype).view(entry.shape)
        try:
            decoded = torch.empty((entry.rows, columns_of(entry.shape)), dtype=entry.dtype)
            return entry.codec.decode(entry.encoded(0, entry.rows), decoded).view(entry.shape)
        finally:
            pager.unpin(entry)


def _run_decoded(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run any operation on plain tensors; writes are copied back into the managed ones."""
    plain: dict[int, tuple[ManagedTensor, torch.Tensor]] = {}

    def unwrap(value: Any) -> Any:
        if type(value) is not ManagedTensor:
            return value
        if id(value.entry) not in plain:
            plain[id(value.entry)] = (value, _values_of(value))
        return plain[id(value.entry)][1]

    plain_args, plain_kwargs = _pytree.tree_map(unwrap, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    outputs = [leaf for leaf in _pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor | np.ndarray)]
    for managed, decoded in plain.values():
        if _is_written(func, args, kwargs, managed):
            _write_back(managed, decoded)
        if any(output is not decoded and managed.entry.holds(_address(output)) for output in outputs):
            managed.entry.mark_aliased()

    def rewrap(value: Any) -> Any:
        for managed, decoded in plain.values():
            if decoded is value:
                return managed
            if isinstance(value, torch.Tensor | np.ndarray) and not managed.entry.holds(_address(decoded)):
                value = _Copy(managed, decoded).wrap(value)
        return value

    return _pytree.tree_map(rewrap, result)


def _is_written(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tensor: Any) -> bool:
    """Return whether an operation writes to one of its operands."""
    name = getattr(func, "__name__", "").split(".")[0]  # below the Python interface: `add_.Tensor`
    writes = name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__"))
    writes = writes or (name.startswith("__i") and name not in ("__int__", "__index__", "__invert__"))
    return bool(writes and args and args[0] is tensor) or kwargs.get("out") is tensor


class _Copy:
    """The decoded values of a managed tensor, of which callers hold views."""

    def __init__(self, managed: ManagedTensor, decoded: torch.Tensor) -> None:
        self.managed, self.decoded, self.writes = managed, decoded, managed.entry.writes

    def refresh(self) -> None:
        """Decode again after writes through the tensor itself or through views of another copy."""
        if self.writes != self.managed.entry.writes:
            self.decoded.copy_(_values_of(self.managed))
            self.writes = self.managed.entry.writes

    def write_back(self) -> None:
        """Encode writes made through a view."""
        _write_back(self.managed, self.decoded)
        self.writes = self.managed.entry.writes

    def wrap(self, value: torch.Tensor | np.ndarray) -> Any:
        """Wrap a result that is a view of the copy, so that writes to it are not lost."""
        start, stop = _address(self.decoded), _address(self.decoded) + self.decoded.untyped_storage().nbytes()
        if not start <= _address(value) < stop or not start:
            return value
        if isinstance(value, np.ndarray):
            value.flags.writeable = False  # torch does not see writes by numpy
            return value
        view = value.as_subclass(ManagedView)
        view.of = self
        return view


class ManagedView(torch.Tensor):
    """A view of a managed tensor with a lossy codec: writes to it are encoded again.

    Attributes:
        of: the decoded copy that it is a view of.
    """

    of: _Copy

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation on the current values, and keep its writes."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _METADATA:
                return func(*args, **kwargs)
            views = [leaf for leaf in _pytree.tree_leaves((args, kwargs)) if type(leaf) is ManagedView]
            for view in views:
                view.of.refresh()
            plain = {id(view): view.as_subclass(torch.Tensor) for view in views}
        plain_args, plain_kwargs = _pytree.tree_map(lambda each: plain.get(id(each), each), (args, kwargs))
        result = func(*plain_args, **plain_kwargs)
        for view in views:
            if _is_written(func, args, kwargs, view):
                view.of.write_back()

        def rewrap(value: Any) -> Any:
            for view in views:
                if plain[id(view)] is value:
                    return view
                if isinstance(value, torch.Tensor | np.ndarray):
                    value = view.of.wrap(value)
            return value

        return _pytree.tree_map(rewrap, result)


def _address(tensor: torch.Tensor | np.ndarray) -> int:
    if isinstance(tensor, np.ndarray):
        return tensor.ctypes.data
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a layout without storage shares no memory
        return 0


def _write_back(managed: ManagedTensor, decoded: torch.Tensor) -> None:
    pager, entry = managed.pager, managed.entry
    with pager.writing(entry):
        segments = entry.encoded(0, entry.rows)
        data = next(iter(segments.values()))
        in_place = decoded.untyped_storage().data_ptr() == data.untyped_storage().data_ptr()
        if not in_place:
            for name, values in entry.codec.encode(decoded.to(entry.dtype)).items():
                segments[name].copy_(values)
