"""Replace a model's large weights by managed tensors."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ...compression import Codec, Segment, create_codec
from ...errors import CheckpointError
from ...paging import FileSource, ManagedTensor, Pager, TensorEntry, join
from ...pools import FRAME_BYTES, reserve, unreserve
from ...storage import Checkpoint, DirectFile, TensorExtent
from ..compat import INIT_METHOD, initialise
from ..layers.decoder_layer import joined_names
from .formats import TORCH_DTYPES
from .packing import CODECS_KEY, SHAPES_KEY, Progress, find, original_dtypes, segment_name
from .skeleton import WeightSite, codec_for, materialize_buffers, put, rows_per_page, weight_sites
from .small_tensors import read_small_tensors

logger = logging.getLogger(__name__)

_VISION = ".visual."
_EMBEDDING = "embed_tokens.weight"
_HEAD = "lm_head.weight"
_SLACK_BYTES = 2 * FRAME_BYTES


@dataclass(frozen=True, slots=True)
class _Place:
    """The address of a tensor, and its reserved address space."""

    address: int
    reserved: int
    reserved_bytes: int


class WeightLoader:
    """Fills a skeleton from a checkpoint (read in place or packed), or takes over the weights of a model in memory.

    Args:
        pager: owns the managed weights.
        compute_dtype: of activations, and of the weights as seen by the model.
        progress: called as small tensors are read.
        joins: place weights that are multiplied by the same input side by side (see `paging.join`), where possible.
        model_name: distinguishes a second model's weights from the first's in the same Pager; the first has none.
    """

    def __init__(
        self,
        pager: Pager,
        compute_dtype: torch.dtype,
        progress: Progress | None = None,
        *,
        joins: bool = False,
        model_name: str = "",
    ) -> None:
        self._pager = pager
        self._prefix = f"{model_name}/" if model_name else ""
        self._dtype = compute_dtype
        self._joins = joins
        self._report = progress or (lambda description, done, total: None)
        self._codecs: dict[str, Codec] = {}
        self._files: dict[Path, DirectFile] = {}
        self._dtypes: dict[str, torch.dtype] = {}  # of encoded weights, in the checkpoint that was packed
        self._small: dict[str, torch.Tensor] = {}  # already read
        self._begun: dict[str, ManagedTensor] = {}  # already registered

    def _codec(self, name: str) -> Codec:
        if name not in self._codecs:
            self._codecs[name] = create_codec(name)
        return self._codecs[name]

    def begin(self, checkpoint: Checkpoint) -> list[str]:
        """Register the large weights of a packed checkpoint before its model is built (for `from_checkpoint`).

        Returns:
            The weights that every pass uses, in that order: the Pager may prefetch them.

        Raises:
            CheckpointError: the checkpoint is incomplete.
            CorruptDataError: a checksum does not match.
            MemoryBudgetExceeded: the non-evictable weights do not fit.
        """
        codecs = json.loads(checkpoint.metadata.get(CODECS_KEY, "{}"))
        self._dtypes = original_dtypes(checkpoint)
        shapes = json.loads(checkpoint.metadata.get(SHAPES_KEY, "{}"))
        small = (extent for name, extent in checkpoint.tensors.items() if name not in codecs)
        self._small |= read_small_tensors(small, self._file)
        places = self._places_of({name: checkpoint.tensors[name] for name in codecs if name in checkpoint.tensors})
        for name, extent in checkpoint.tensors.items():
            if name in codecs:
                codec, shape = self._codec(codecs[name]), tuple(shapes.get(name, extent.shape))
                self._begun[name] = self._register(name, shape, checkpoint, extent, codec, places.get(name))
        self._join(places, self._begun)
        every_pass = [name for name in self._begun if _VISION not in name and not name.endswith(_EMBEDDING)]
        # Only single rows of an embedding are read, unless it is also the head: then all of it, last.
        head = [name for name in self._begun if name.endswith(_EMBEDDING) and _HEAD not in self._begun]
        return [self._prefix + name for name in every_pass + head]

    def from_checkpoint(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        """Fill `model` (see `build_skeleton`): read small tensors, and register large ones to be read on demand.

        Raises:
            CheckpointError: a tensor is missing or has another shape.
            MemoryBudgetExceeded: the non-evictable weights do not fit.
        """
        codecs = json.loads(checkpoint.metadata.get(CODECS_KEY, "{}"))
        self._dtypes = original_dtypes(checkpoint)
        sites = weight_sites(model)
        extents = {site.name: find(checkpoint, checkpoint.tensors, site) for site in sites}
        total = sum(extent.n_bytes for extent in extents.values())
        done = 0
        managed = {site.name: extents[site.name] for site in sites if site.managed and site.name not in self._begun}
        places = self._places_of(managed)
        registered: dict[str, ManagedTensor] = {}
        for site in sites:
            extent = extents[site.name]
            begun = self._begun.pop(site.name, None)
            if begun is not None and site.managed and begun.shape == site.shape:
                put(site, begun)
            elif site.managed:
                codec = self._codec(codecs.get(site.name, "none"))
                registered[site.name] = self._register(
                    site.name, site.shape, checkpoint, extent, codec, places.get(site.name)
                )
                put(site, registered[site.name])
            else:
                self._pager.ledger.add("small weights", math.prod(site.shape) * self._dtype.itemsize)
                put(site, nn.Parameter(self._read(extent).to(self._dtype), requires_grad=False))
            done += extent.n_bytes
            self._report("loading", done, total)
        self._join(places, registered)
        unused = checkpoint.tensors.keys() - {
            segment_name(site.name, segment.name, index == 0)
            for site in sites
            for index, segment in enumerate(
                self._codec(codecs.get(site.name, "none")).segments(site.shape, self._dtype)
            )
        }
        self._forget_unused()
        unused -= {name for site in sites for name in site.aliases}  # tied, and identical
        if unused:
            logger.warning("the model does not use %d tensors of the checkpoint: %s", len(unused), sorted(unused)[:5])

    def _forget_unused(self) -> None:
        """Release registered weights that have no place in the model."""
        for tensor in self._begun.values():
            self._pager.free(tensor.tensor_id)
        self._begun.clear()
        self._small.clear()

    def _read(self, extent: TensorExtent) -> torch.Tensor:
        """Return a small tensor, whole; those of a packed checkpoint are read together."""
        if extent.name not in self._small:
            self._small |= read_small_tensors([extent], self._file)
        return self._small.pop(extent.name)

    def _file(self, extent: TensorExtent) -> DirectFile:
        if extent.path not in self._files:
            self._files[extent.path] = DirectFile(extent.path)
        return self._files[extent.path]

    def _places_of(self, extents: Mapping[str, TensorExtent]) -> dict[str, _Place]:
        """Reserve adjacent address space for weights that are multiplied together; omits all others.

        Such weights must end in whole page frames, and start at a frame boundary in the file, as packing writes them.
        """
        places: dict[str, _Place] = {}
        for names in joined_names(extents) if self._joins else ():
            group = [extents[name] for name in names]
            if any(extent.n_bytes % FRAME_BYTES or extent.offset_bytes % FRAME_BYTES for extent in group):
                continue
            address = reserve(sum(extent.n_bytes for extent in group) + _SLACK_BYTES)
            for name, extent in zip(names, group, strict=True):
                slack = _SLACK_BYTES if name == names[-1] else 0
                places[name] = _Place(address, address, extent.n_bytes + slack)
                address += extent.n_bytes
        return places

    def _join(self, places: Mapping[str, _Place], tensors: Mapping[str, ManagedTensor]) -> None:
        for names in joined_names(places):
            join([tensors[name].entry for name in names])

    def _register(
        self,
        tensor_name: str,
        shape: tuple[int, ...],
        checkpoint: Checkpoint,
        extent: TensorExtent,
        codec: Codec,
        place: _Place | None,
    ) -> ManagedTensor:
        stored_dtype = TORCH_DTYPES[extent.dtype]
        segments = codec.segments(shape, stored_dtype)
        first = segments[0]
        resident = {}
        for segment in segments[1:]:
            name = segment_name(tensor_name, segment.name, False)
            if name not in checkpoint.tensors:
                raise CheckpointError(f"{extent.path}: the tensor {name!r} is missing; pack again", path=extent.path)
            self._pager.ledger.add("small weights", segment.n_bytes)
            resident[segment.name] = self._read(checkpoint.tensors[name])
        row_bytes = first.n_bytes // first.shape[0]
        rows = extent.page_bytes // row_bytes if extent.page_bytes else self._page_rows(first, codec, shape)
        if place is None:
            lead = extent.offset_bytes % FRAME_BYTES  # direct reads need file offset and address equal modulo a block
            reserved_bytes = lead + first.n_bytes + _SLACK_BYTES
            start = reserve(reserved_bytes)
            place = _Place(start + lead, start, reserved_bytes)
        entry = TensorEntry(
            self._prefix + tensor_name,
            "weights",
            shape,
            self._dtype,
            codec,
            place.address,
            first.dtype,
            (first.shape[0], first.shape[1]),
            resident,
            rows_per_page=rows,
            page_bytes=rows * row_bytes,
            source=FileSource(self._file(extent), extent.offset_bytes, extent.checksums),
            original_bytes=math.prod(shape) * self._dtypes.get(tensor_name, stored_dtype).itemsize,
        )
        self._release_address_space(entry, place)
        self._pager.add(entry, resident=False)
        return ManagedTensor(self._pager, entry)

    @staticmethod
    def _page_rows(first: Segment, codec: Codec, shape: tuple[int, ...]) -> int:
        return rows_per_page(first.shape, first.dtype.itemsize)

    def _release_address_space(self, entry: TensorEntry, place: _Place) -> None:
        frames = self._pager.frames

        def release() -> None:
            frames.forget(place.reserved, place.reserved_bytes)
            unreserve(place.reserved, place.reserved_bytes)

        entry.on_released = release

    def from_memory(self, model: nn.Module, codec_name: str, *, initialize: bool) -> None:
        """Encode the weights of a model in memory one by one, releasing the originals.

        Args:
            model: changed in place.
            codec_name: for the large weights.
            initialize: the model is a skeleton, as is any on the meta device; initial weights are drawn as in
                transformers, module by module.

        Raises:
            MemoryBudgetExceeded: the weights fit neither memory nor the swap file.
        """
        sites = weight_sites(model)
        if initialize or any(parameter.is_meta for parameter in model.parameters()):
            drawn: set[int] = set()
            for site in sites:
                for module, _ in site.holders[:1]:
                    if id(module) not in drawn:
                        drawn.add(id(module))
                        _draw(model, module)
                self._take(site, codec_name, from_module=True)
            materialize_buffers(model)
        else:
            for site in sites:
                self._take(site, codec_name, from_module=False)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point() and "inv_freq" not in name:
                    module._buffers[name] = buffer.to(self._dtype)

    def _take(self, site: WeightSite, codec_name: str, *, from_module: bool) -> None:
        module, attribute = site.holders[0]
        values = module._parameters[attribute]
        assert values is not None
        if not site.managed:
            put(site, nn.Parameter(values.detach().to(self._dtype), requires_grad=False))
            return
        codec = codec_for(site, values.dtype, self._codec(codec_name), self._codec, values.detach)
        stored = values.detach().to(self._dtype) if codec.lossless else values.detach()
        segments = codec.segments(site.shape, stored.dtype)
        first = segments[0]
        rows = self._page_rows(first, codec, site.shape)
        encoded = self._pager.encodings.encode_weight(self._prefix + site.name, codec, stored)
        reserved_bytes = first.n_bytes + _SLACK_BYTES
        address = reserve(reserved_bytes)
        entry = TensorEntry(
            self._prefix + site.name,
            "weights",
            site.shape,
            self._dtype,
            codec,
            address,
            first.dtype,
            (first.shape[0], first.shape[1]),
            {segment.name: encoded[segment.name] for segment in segments[1:]},
            rows_per_page=rows,
            page_bytes=rows * (first.n_bytes // first.shape[0]),
            original_bytes=values.nbytes,
        )
        self._pager.ledger.add("small weights", sum(segment.n_bytes for segment in segments[1:]))
        self._release_address_space(entry, _Place(address, address, reserved_bytes))
        self._pager.add(entry, resident=True)
        with self._pager.writing(entry):
            entry.encoded(0, entry.rows)[first.name].copy_(encoded[first.name])
        put(site, ManagedTensor(self._pager, entry))


def _draw(model: nn.Module, module: nn.Module) -> None:
    """Initialize one module of a skeleton as transformers would."""
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.is_meta:
            real = nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False)
            for other in model.modules():
                for attribute, held in other._parameters.items():
                    if held is parameter:
                        other._parameters[attribute] = real
            module._parameters[name] = real
    # The innermost model that holds the module initializes it: the vision tower has its own configuration.
    holders = [each for each in model.modules() if hasattr(each, INIT_METHOD) and module in set(each.modules())]
    with torch.no_grad():
        initialise(holders[-1], module)
