"""Record what a module's results depend on besides its inputs: code, hooks and values.

Two snapshots of a module are compared. If its *code* differs (classes, methods, functions of their files, forwards of
single modules, hooks, structure), it may compute anything. If only *values* differ (weights, buffers, numbers and names
in modules and in the configuration), it computes the same function from other values.
"""

from __future__ import annotations

import builtins
import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional
import xxhash
from torch import nn
from torch.nn.modules import module as torch_module

from ...paging import ManagedTensor, Pager
from ..compat import attention_name, registered_attention

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_METHODS = (property, staticmethod, classmethod)
_NUMBERS = frozenset({bool, int, float, str, type(None)})
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_BOOKKEEPING = frozenset(nn.Module().__dict__) | {"rope_deltas", "generation_config", "memory_optimizer"}
"""Attributes that do not affect keys and values: torch's own (hooks, parameters, buffers and children are examined by
name), state left by calls, decoding settings, and the optimizer.
"""
_OF_FILES = frozenset({"_name_or_path", "_commit_hash", "transformers_version", "memory_optimization_config"})
"""Configuration entries about its origin."""
_MOST_COPIED_BYTES = 16 << 20
_TRUSTED = ("torch", "transformers", "huggingface_hub", "safetensors", "accelerate", __name__.split(".")[0])
"""Packages whose version identifies their code. The middle three put functions into modules of transformers."""


class ModelState:
    """One snapshot of a module.

    Args:
        part: the module.
        pager: owns the large weights.
        first: an earlier snapshot. Names added since to modules, classes and files are ignored unless they shadow
            others, because unchanged code does not use them. (transformers adds methods at run time.)

    Attributes:
        code: objects whose identity determines the computation; kept alive, so that no address is reused.
        values: inputs of that code, as text and numbers.
        names: the relevant names of each module, class and file.
        known: whether `values` is complete. False if a caller holds views of weights, tensors cannot be read (by kind
            or location), or torch redirects every operation.
    """

    def __init__(self, part: nn.Module, pager: Pager, first: ModelState | None = None) -> None:
        self.code: list[Any] = []
        self.values: list[Any] = []
        self.known = not _is_redirected()
        self.names: dict[str | type, Collection[str]] = {}
        self._pager = pager
        self._digests: dict[int, str] = {}
        classes: dict[type, None] = {}
        for name, module in part.named_modules():
            self.values.append(name)
            self._look_at(module, self._names(name, module.__dict__, first, partial(hasattr, type(module))))
            classes.update(dict.fromkeys(type(module).__mro__))
        self._look_at_classes(list(classes), first)
        self._look_at_settings(part)

    def _names(
        self, owner: str | type, found: Mapping[str, Any], first: ModelState | None, shadows: Callable[[str], bool]
    ) -> Collection[str]:
        """Return the relevant names among `found`; `shadows`: returns whether a name shadows another."""
        names = None if first is None else first.names.get(owner)
        if names is None:
            names = frozenset(found)
        elif found.keys() != names:
            names = frozenset(each for each in found if each in names or shadows(each))
        self.names[owner] = names
        return names

    def same_code(self, other: ModelState) -> bool:
        """Return whether two snapshots saw the same code."""
        mine, theirs = self.code, other.code
        return len(mine) == len(theirs) and all(a is b for a, b in zip(mine, theirs, strict=True))

    def is_trusted(self) -> bool:
        """Return whether all code is that of Python, torch, transformers and this package, as in their files."""
        return all(map(_is_trusted, self.code))

    # --- one module ---------------------------------------------------------------------------------------------------

    def _look_at(self, module: nn.Module, names: Collection[str]) -> None:
        attributes = module.__dict__
        self.code.append(type(module))
        for name in _HOOKS:
            self.code += (hook for hook in attributes[name].values() if not getattr(hook, "changes_nothing", False))
        self.code.append(None)
        for name, value in attributes.items():
            if name in _BOOKKEEPING or name not in names:
                continue
            if type(value) in _NUMBERS:
                self.values += (name, value)
            elif isinstance(value, _PLAIN):
                self.values += (name, str(value))
            elif isinstance(value, list | tuple | set | frozenset | dict):
                self.values += (name, text_of(value))
            elif isinstance(value, torch.Tensor):
                self.values += (name, self._tensor(value))
            elif callable(value):
                self.code.append(value)
        for registry in ("_parameters", "_buffers"):
            for name, tensor in attributes[registry].items():
                self.values += (name, None if tensor is None else self._tensor(tensor))

    def _tensor(self, tensor: torch.Tensor) -> Any:
        if type(tensor) is ManagedTensor:
            entry = tensor.entry
            if tensor.pager is not self._pager or entry.aliased or entry.freed:
                self.known = False
            return [entry.tensor_id, entry.writes]
        found = self._digests.get(id(tensor))
        if found is None:
            found = self._digests[id(tensor)] = self._digest(tensor)
        return found

    def _digest(self, tensor: torch.Tensor) -> str:
        plain = type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer)
        if not plain or tensor.device.type != "cpu" or tensor.layout is not torch.strided:
            self.known = False
            return ""
        data = tensor.detach()
        if not data.is_contiguous():
            if data.nbytes > _MOST_COPIED_BYTES:
                self.known = False
                return ""
            data = data.contiguous()
        found = xxhash.xxh3_128(f"{data.dtype} {tuple(data.shape)} ".encode())
        if data.numel():
            found.update(data.reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

    # --- code and settings shared by modules --------------------------------------------------------------------------

    def _look_at_classes(self, classes: list[type], first: ModelState | None) -> None:
        files = {"torch.nn.functional": None}
        for each in classes:
            if each is object:
                continue
            files[each.__module__] = None
            found = vars(each)
            names = self._names(each, found, first, partial(_has, each.__mro__[1:]))
            methods = (value for name, value in found.items() if name in names)
            self.code += (value for value in methods if callable(value) or isinstance(value, _METHODS))
        for file in files:
            inside: Mapping[str, Any] = vars(sys.modules[file]) if file in sys.modules else {}
            names = self._names(f"file {file}", inside, first, partial(hasattr, builtins))
            self.code += (value for name, value in inside.items() if type(value) is FunctionType and name in names)

    def _look_at_settings(self, part: nn.Module) -> None:
        config = getattr(part, "config", None)
        if config is not None:
            self.values.append(text_of(config))
            self.code += _attention_functions(config)
        self.values += (str(torch.get_default_dtype()), torch.get_float32_matmul_precision())


def _has(classes: Sequence[type], name: str) -> bool:
    return any(name in vars(each) for each in classes)


def _is_redirected() -> bool:
    """Return whether torch redirects every module call or every operation."""
    hooks = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
    modes = torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack()
    return any(hooks) or modes > 0 or torch.is_autocast_enabled("cpu")


def _attention_functions(config: Any) -> Iterator[Any]:
    """Yield the functions behind the names of attention implementations."""
    configs = (config, *(getattr(config, name, None) for name in ("text_config", "vision_config")))
    for each in configs:
        yield registered_attention(attention_name(each))


def text_of(value: Any) -> str:
    """Return plain values, and configurations of such, as text; for any other object, its type."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, dict):
        items = ((name, each) for name, each in value.items() if name not in _OF_FILES)
        return "{" + ",".join(f"{text_of(name)}:{text_of(each)}" for name, each in items) + "}"
    if isinstance(value, set | frozenset):
        return "{" + ",".join(sorted(map(text_of, value))) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(text_of, value)) + "]"
    if hasattr(value, "to_dict") and hasattr(value, "__dict__"):
        return text_of(vars(value))
    return type(value).__qualname__


def _is_trusted(code: Any) -> bool:
    """Return whether code comes from a file of a trusted package or of Python; C code is judged by its type."""
    while True:
        if isinstance(code, property):
            code = code.fget
        elif isinstance(code, staticmethod | classmethod) or inspect.ismethod(code):
            code = code.__func__
        else:
            break
    if code is None:
        return True
    if inspect.isfunction(code):
        return _is_trusted_file(code.__code__.co_filename)
    kind = code if isinstance(code, type) else type(code)
    return kind.__module__.split(".")[0] in (*_TRUSTED, *sys.stdlib_module_names) and kind.__module__ != "__main__"


@lru_cache(maxsize=1024)
def _is_trusted_file(name: str) -> bool:
    path = Path(name)
    imported = (sys.modules[each] for each in _TRUSTED if each in sys.modules)
    if name.startswith("<frozen ") or any(path.is_relative_to(Path(each.__file__ or "").parent) for each in imported):
        return True
    installed = {"site-packages", "dist-packages"}.intersection(path.parts)
    return path.is_relative_to(Path(inspect.__file__).parent) and not installed
