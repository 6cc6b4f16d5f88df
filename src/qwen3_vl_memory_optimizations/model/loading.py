"""Putting managed tensors in the place of a model's large weights."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import torch
import xxhash
from torch import nn

from ..compression import Codec, KernelSelector, Segment, create_codec
from ..errors import CheckpointError, CorruptDataError
from ..paging import FileSource, ManagedTensor, Pager, TensorEntry
from ..pools import FRAME_BYTES, reserve, unreserve
from ..storage import Checkpoint, DirectFile, TensorExtent
from .packing import CODECS_KEY, TORCH_DTYPES, Progress, find_extent, read_row_chunks, segment_name
from .skeleton import WeightSite, codec_for, materialize_buffers, rows_per_page, weight_sites

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 16 << 20
_PAGE_WHOLE_BYTES = 1 << 62


class WeightLoader:
    """Fills a skeleton from a checkpoint (read in place or packed), or takes over the weights of a model in memory.

    Args:
        pager: owns the managed weights.
        compute_dtype: of activations and of the weights as the model sees them.
        progress: called as small tensors are read.
        model_name: tells the weights of a second model in the same Pager from those of the first, which has none.
    """

    def __init__(
        self, pager: Pager, compute_dtype: torch.dtype, progress: Progress | None = None, *, model_name: str = ""
    ) -> None:
        self._pager = pager
        self._prefix = f"{model_name}/" if model_name else ""
        self._dtype = compute_dtype
        self._report = progress or (lambda description, done, total: None)
        self._kernels = KernelSelector()
        self._codecs: dict[str, Codec] = {}
        self._files: dict[Path, DirectFile] = {}

    def _codec(self, name: str) -> Codec:
        if name not in self._codecs:
            self._codecs[name] = create_codec(name, self._kernels)
        return self._codecs[name]

    def from_checkpoint(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        """Fill `model` (see `build_skeleton`): small tensors are read, large ones registered to be read on demand.

        Raises:
            CheckpointError: a tensor is missing or has another shape.
            MemoryBudgetExceeded: what must stay resident does not fit.
        """
        codecs = json.loads(checkpoint.metadata.get(CODECS_KEY, "{}"))
        sites = weight_sites(model)
        extents = {site.name: find_extent(checkpoint, site) for site in sites}
        total = sum(extent.n_bytes for extent in extents.values())
        done = 0
        for site in sites:
            extent = extents[site.name]
            if site.managed:
                put(site, self._register(site, checkpoint, extent, self._codec(codecs.get(site.name, "none"))))
            else:
                self._pager.ledger.add("small weights", math.prod(site.shape) * self._dtype.itemsize)
                put(site, nn.Parameter(self._read(extent).to(self._dtype), requires_grad=False))
            done += extent.n_bytes
            self._report("loading", done, total)
        unused = checkpoint.tensors.keys() - {
            segment_name(site.name, segment.name, index == 0)
            for site in sites
            for index, segment in enumerate(
                self._codec(codecs.get(site.name, "none")).segments(site.shape, self._dtype)
            )
        }
        tied = [name for name in unused if name == "lm_head.weight"]
        if len(unused) > len(tied):
            logger.warning("the checkpoint has %d tensors the model does not use: %s", len(unused), sorted(unused)[:5])

    def _read(self, extent: TensorExtent) -> torch.Tensor:
        """Read a small tensor whole."""
        dtype, shape = TORCH_DTYPES[extent.dtype], tuple(extent.shape)
        chunks = read_row_chunks(self._file(extent), extent, dtype, shape, _PAGE_WHOLE_BYTES)
        values = [chunk.clone() for chunk in chunks][0]
        data = values.reshape(-1).view(torch.uint8).numpy().data
        page_bytes = extent.page_bytes or max(extent.n_bytes, 1)
        for index, expected in enumerate(extent.checksums or ()):
            if xxhash.xxh3_64_intdigest(data[index * page_bytes : (index + 1) * page_bytes]) != expected:
                raise CorruptDataError(
                    f"{extent.path}: {extent.name}: page {index} has another checksum than recorded; the file is "
                    "damaged; delete its directory to pack again",
                    path=extent.path,
                )
        return values

    def _file(self, extent: TensorExtent) -> DirectFile:
        if extent.path not in self._files:
            self._files[extent.path] = DirectFile(extent.path)
        return self._files[extent.path]

    def _register(self, site: WeightSite, checkpoint: Checkpoint, extent: TensorExtent, codec: Codec) -> ManagedTensor:
        stored_dtype = TORCH_DTYPES[extent.dtype]
        segments = codec.segments(site.shape, stored_dtype)
        first = segments[0]
        resident = {}
        for segment in segments[1:]:
            name = segment_name(site.name, segment.name, False)
            if name not in checkpoint.tensors:
                raise CheckpointError(f"{extent.path}: the tensor {name!r} is missing; pack again", path=extent.path)
            self._pager.ledger.add("small weights", segment.n_bytes)
            resident[segment.name] = self._read(checkpoint.tensors[name])
        row_bytes = first.n_bytes // first.shape[0]
        rows = extent.page_bytes // row_bytes if extent.page_bytes else self._page_rows(first, codec, site)
        lead = extent.offset_bytes % FRAME_BYTES  # direct reads need file offset and address equal modulo a block
        entry = TensorEntry(
            self._prefix + site.name,
            "weights",
            site.shape,
            self._dtype,
            codec,
            reserve(lead + first.n_bytes + 2 * FRAME_BYTES) + lead,
            first.dtype,
            (first.shape[0], first.shape[1]),
            resident,
            rows_per_page=rows,
            page_bytes=rows * row_bytes,
            source=FileSource(self._file(extent), extent.offset_bytes, extent.checksums),
        )
        self._release_address_space(entry, lead)
        self._pager.add(entry, resident=False)
        return ManagedTensor(self._pager, entry)

    @staticmethod
    def _page_rows(first: Segment, codec: Codec, site: WeightSite) -> int:
        return rows_per_page(first.shape, first.dtype.itemsize, codec.row_block(site.shape))

    def _release_address_space(self, entry: TensorEntry, lead: int) -> None:
        address, n_bytes, frames = entry.address - lead, lead + entry.n_bytes + 2 * FRAME_BYTES, self._pager.frames

        def release() -> None:
            frames.forget(address, n_bytes)
            unreserve(address, n_bytes)

        entry.on_released = release

    def from_memory(self, model: nn.Module, codec_name: str, *, initialize: bool) -> None:
        """Encode the weights of a model in memory one by one, letting go of the originals.

        Args:
            model: changed in place.
            codec_name: for the large weights.
            initialize: the model is a skeleton, as is any on the meta device; weights are drawn as transformers does,
                module by module.

        Raises:
            MemoryBudgetExceeded: what has no place in memory cannot be swapped out either.
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
        rows = self._page_rows(first, codec, site)
        encoded = codec.encode(stored)
        entry = TensorEntry(
            self._prefix + site.name,
            "weights",
            site.shape,
            self._dtype,
            codec,
            reserve(first.n_bytes + 2 * FRAME_BYTES),
            first.dtype,
            (first.shape[0], first.shape[1]),
            {segment.name: encoded[segment.name] for segment in segments[1:]},
            rows_per_page=rows,
            page_bytes=rows * (first.n_bytes // first.shape[0]),
        )
        self._pager.ledger.add("small weights", sum(segment.n_bytes for segment in segments[1:]))
        self._release_address_space(entry, 0)
        self._pager.add(entry, resident=True)
        entry.encoded(0, entry.rows)[first.name].copy_(encoded[first.name])
        put(site, ManagedTensor(self._pager, entry))


def _draw(model: nn.Module, module: nn.Module) -> None:
    """Give one module of a skeleton the initial weights that transformers would."""
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.is_meta:
            real = nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False)
            for other in model.modules():
                for attribute, held in other._parameters.items():
                    if held is parameter:
                        other._parameters[attribute] = real
            module._parameters[name] = real
    # The innermost model that holds the module knows how: the vision tower has a configuration of its own.
    holders = [each for each in model.modules() if hasattr(each, "_init_weights") and module in set(each.modules())]
    with torch.no_grad():
        holders[-1]._init_weights(module)  # type: ignore[operator]


def put(site: WeightSite, tensor: torch.Tensor) -> None:
    """Put a tensor in every place of a parameter; tied weights stay one."""
    for module, attribute in site.holders:
        module._parameters[attribute] = tensor  # type: ignore[assignment]
