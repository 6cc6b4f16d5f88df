"""From a Hugging Face checkpoint to a packed one: encoded, in the order of use, each page ready for a direct read."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..compression import ROW_MULTIPLE, Codec, columns_of, create_codec
from ..config import MemoryConfig
from ..errors import CheckpointError, CodecError, ConfigurationError
from ..storage import (
    AlignedBuffer,
    Checkpoint,
    DirectFile,
    PackedEntry,
    PackedLayout,
    PackedWriter,
    TensorExtent,
    pack_lock,
)
from .packed_encodings import ENCODINGS_FILE, PackedEncodings
from .plan import CompressionPlan
from .skeleton import WeightSite, build_skeleton, codec_for, rows_per_page, weight_sites

Progress = Callable[[str, int, int], None]
"""Called with a description, the bytes done and the bytes in all."""

CODECS_KEY = "qwen3vl_mem.codecs"
SHAPES_KEY = "qwen3vl_mem.shapes"
"""Metadata of packed checkpoints: tensor name -> codec; and -> shape, where that of the first segment is another."""
PLAN_KEY = "qwen3vl_mem.plan"
"""Metadata of checkpoints packed by a plan: its fingerprint."""
_CHUNK_BYTES = 16 << 20
_SIDE_FILE_MOST_BYTES = 64 << 20
_WEIGHT_FILE = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx)(\.index\.json)?$")

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SAFETENSORS_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def segment_name(tensor_name: str, segment: str, is_first: bool) -> str:
    """Return the name of a segment in a packed checkpoint; the first one has the name of the tensor."""
    return tensor_name if is_first else f"{tensor_name}.{segment}"


def packed_directory(source: Checkpoint, codec: str, config: MemoryConfig) -> Path:
    """Return where the packed form of a checkpoint lies, or will."""
    stem = source.directory.resolve().name or "model"
    name = codec if codec == "auto" else create_codec(codec).stored_name
    return config.packed_dir / f"{stem}-{source.fingerprint()[:12]}-{name}"


def plan_path(source: Checkpoint, config: MemoryConfig) -> Path:
    """Return where the plan of a checkpoint is kept: beside the packed form, `….plan.json`."""
    return plan_path_of(packed_directory(source, "auto", config))


def plan_path_of(packed: Path) -> Path:
    """Return where the plan of a packed checkpoint is kept, if it has one."""
    return packed.with_name(f"{packed.name}.plan.json")


def find_packed(source: Checkpoint, codec: str, config: MemoryConfig) -> Path | None:
    """Return the directory of the packed form, where it is there and no other plan was put beside it since.

    Raises:
        ConfigurationError: the plan that is kept cannot be read.
    """
    directory, path = packed_directory(source, codec, config), plan_path(source, config)
    plan = CompressionPlan.load(path) if codec == "auto" and path.is_file() else None
    return directory if _is_packed(directory, plan) else None


def pack_checkpoint(
    source_dir: str | Path,
    *,
    codec: str = "int8",
    plan: CompressionPlan | None = None,
    config: MemoryConfig | None = None,
    progress: Progress | None = None,
) -> Path:
    """Pack a checkpoint, once; the next call returns at once.

    It holds a few chunks of one tensor at a time. Interrupted, it goes on where it stopped; two processes do the work
    once.

    Args:
        source_dir: a Hugging Face directory.
        codec: how large weights are encoded, without a plan.
        plan: a codec for each, kept beside the result before the work begins; what another plan made of the
            checkpoint is replaced.
        config: says where packed checkpoints lie.
        progress: called as the work goes on.

    Returns:
        The directory of the packed checkpoint; the source where the plan encodes nothing.

    Raises:
        CheckpointError: the source is not a usable checkpoint.
        ConfigurationError: the plan is that of another checkpoint.
        InsufficientDiskSpaceError: the result does not fit on the disk.
    """
    config = config or MemoryConfig()
    source = Checkpoint.open(source_dir)
    if source.packed:
        raise ConfigurationError(f"{source_dir} is packed already")
    final_dir = packed_directory(source, "auto" if plan else codec, config)
    if _is_packed(final_dir, plan):
        _keep(plan, plan_path(source, config))
        return final_dir
    skeleton = build_skeleton(source, torch.float32)
    sites = weight_sites(skeleton)
    codecs: dict[str, str] = {}
    if plan is not None:
        plan.require_names(site.name for site in sites if site.managed)
        codecs = {name: weight.codec for name, weight in plan.weights.items()}
        codec = MemoryConfig().unmeasured_codec()
        if plan.encodes_nothing():
            _keep(plan, plan_path(source, config))
            return source.directory
    stored = _stored(source, sites, lambda name: create_codec(codecs.get(name, codec)))
    report = progress or (lambda description, done, total: None)
    final_dir.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with pack_lock(final_dir):
        if not _is_packed(final_dir, plan):
            _keep(plan, plan_path(source, config))
            _remove_stale(final_dir)
            _write(source, stored, plan, final_dir, report)
    return final_dir


def _keep(plan: CompressionPlan | None, path: Path) -> None:
    """Keep a plan, where it is not kept already: packed checkpoints may lie where nothing can be written."""
    if plan is None:
        return
    try:
        kept = CompressionPlan.load(path)
    except ConfigurationError:
        kept = None  # none yet, or one that nobody can read
    if kept != plan:
        plan.save(path)


def _is_packed(directory: Path, plan: CompressionPlan | None) -> bool:
    """Whether a directory is there, and by this plan if there is one."""
    if not directory.is_dir():
        return False
    return plan is None or Checkpoint.open(directory).metadata.get(PLAN_KEY) == plan.fingerprint()


def _remove_stale(final_dir: Path) -> None:
    """Clear packings of the same directory whose source has changed since: they can never be used again."""
    stem = re.sub(r"-[0-9a-f]{12}-\w+$", "", final_dir.name)
    for other in final_dir.parent.glob(f"{stem}-*.partial"):
        if other.name != f"{final_dir.name}.partial" and re.fullmatch(
            re.escape(stem) + r"-[0-9a-f]{12}-\w+\.partial", other.name
        ):
            shutil.rmtree(other, ignore_errors=True)


Stored = dict[str, tuple[TensorExtent, Codec]]
"""Tensor name -> where it lies in the source, and what encodes it."""


def _stored(source: Checkpoint, sites: list[WeightSite], codec_of: Callable[[str], Codec]) -> Stored:
    """Return all tensors: the large ones in the order of use, then the others."""
    raw = create_codec("none")
    stored: Stored = {}
    for site in sorted(sites, key=lambda site: not site.managed):
        extent = find_extent(source, site)
        stored[site.name] = (extent, _codec(site, extent, codec_of(site.name)) if site.managed else raw)
    return stored


def _codec(site: WeightSite, extent: TensorExtent, codec: Codec) -> Codec:
    dtype, shape = TORCH_DTYPES[extent.dtype], tuple(extent.shape)

    def values() -> torch.Tensor:
        with DirectFile(extent.path) as file:
            return torch.cat([chunk.clone() for chunk in read_row_chunks(file, extent, dtype, shape, _CHUNK_BYTES)])

    return codec_for(site, dtype, codec, create_codec, values)


def find_extent(source: Checkpoint, site: WeightSite) -> TensorExtent:
    """Return where a parameter lies in a checkpoint.

    Raises:
        CheckpointError: it is missing, or has another shape.
    """
    extent = next((source.tensors[name] for name in (site.name, *site.aliases) if name in source.tensors), None)
    if extent is None:
        raise CheckpointError(
            f"{source.directory}: the tensor {site.name!r} is missing; the checkpoint is incomplete or of another "
            "architecture than its config.json says",
            path=source.directory,
        )
    if tuple(extent.shape) != site.shape and not source.packed:
        raise CheckpointError(
            f"{extent.path}: {extent.name!r} has shape {list(extent.shape)}, but config.json asks for "
            f"{list(site.shape)}",
            path=extent.path,
        )
    return extent


def _write(source: Checkpoint, stored: Stored, plan: CompressionPlan | None, final_dir: Path, report: Progress) -> None:
    entries = []
    for name, (extent, codec) in stored.items():
        for index, segment in enumerate(codec.segments(tuple(extent.shape), TORCH_DTYPES[extent.dtype])):
            paged = index == 0 and len(extent.shape) >= 2
            page_bytes = 0
            if paged:
                rows = rows_per_page(segment.shape, segment.dtype.itemsize, codec.row_block(tuple(extent.shape)))
                page_bytes = rows * columns_of(segment.shape) * segment.dtype.itemsize
            dtype = SAFETENSORS_DTYPES[segment.dtype]
            shape = segment.shape if codec.name != "none" else tuple(extent.shape)
            entries.append(
                PackedEntry(segment_name(name, segment.name, index == 0), dtype, shape, segment.n_bytes, page_bytes)
            )
    metadata = {
        "format": "pt",
        CODECS_KEY: json.dumps(
            {name: codec.stored_name for name, (_, codec) in stored.items() if codec.name != "none"}
        ),
        "qwen3vl_mem.source": source.fingerprint(),
    }
    if plan is not None:
        metadata[PLAN_KEY] = plan.fingerprint()
    shapes = {
        name: extent.shape
        for name, (extent, codec) in stored.items()
        if codec.segments(tuple(extent.shape), TORCH_DTYPES[extent.dtype])[0].shape != tuple(extent.shape)
    }
    if shapes:
        metadata[SHAPES_KEY] = json.dumps({name: list(shape) for name, shape in shapes.items()})
    total = sum(extent.n_bytes for extent, _ in stored.values())
    done = 0
    encodings = PackedEncodings()
    with PackedWriter(final_dir, PackedLayout(entries), metadata, replace=plan is not None) as writer:
        complete = writer.open()
        for name, (extent, codec) in stored.items():
            segments = codec.segments(tuple(extent.shape), TORCH_DTYPES[extent.dtype])
            names = [segment_name(name, segment.name, index == 0) for index, segment in enumerate(segments)]
            if not all(part in complete for part in names):
                small: dict[str, list[torch.Tensor]] = {}
                chunks = _encoded_chunks(name, extent, codec, small, segments[0].name, encodings)
                if names[0] in complete:
                    for _ in chunks:  # the small segments of this tensor were not written yet
                        pass
                else:
                    writer.append(names[0], chunks)
                for part, segment in zip(names[1:], segments[1:], strict=True):
                    if part not in complete:
                        values = small[segment.name]
                        writer.append(part, [_bytes(values[0] if segment.shared else torch.cat(values))])
            elif not codec.lossless:  # written before an interruption: its error is not known any more
                next(_encoded_chunks(name, extent, codec, {}, segments[0].name, encodings))
            done += extent.n_bytes
            report("packing", done, total)
        writer.finish(side_files(source.directory), {ENCODINGS_FILE: encodings.to_json()})


def _encoded_chunks(
    name: str,
    extent: TensorExtent,
    codec: Codec,
    small: dict[str, list[torch.Tensor]],
    first: str,
    encodings: PackedEncodings,
) -> Iterator[memoryview]:
    """Yield the bytes of the first segment, some rows at a time; the others collect in `small`."""
    dtype = TORCH_DTYPES[extent.dtype]
    shape = tuple(extent.shape)
    with DirectFile(extent.path) as file:
        for rows in read_row_chunks(file, extent, dtype, shape, _CHUNK_BYTES, codec.row_block(shape)):
            try:
                encoded = encodings.encode(name, codec, rows)
            except CodecError as error:
                raise CheckpointError(
                    f"{extent.path}: {name}: {error}; the checkpoint is damaged: download it again", path=extent.path
                ) from error
            yield _bytes(encoded.pop(first))
            for segment, values in encoded.items():
                small.setdefault(segment, []).append(values)


def read_row_chunks(
    file: DirectFile,
    extent: TensorExtent,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    chunk_bytes: int,
    row_block: int = 1,
) -> Iterator[torch.Tensor]:
    """Yield a tensor some rows at a time, whole blocks of them; each chunk is valid until the next is asked for."""
    if extent.n_bytes == 0:
        yield torch.empty(shape, dtype=dtype)
        return
    rows = shape[0] if shape else 1
    row_bytes = extent.n_bytes // rows
    step = max(1, chunk_bytes // row_bytes // row_block) * row_block
    with AlignedBuffer(min(step, rows) * row_bytes + 2 * 4096) as buffer:
        for start in range(0, rows, step):
            count = min(step, rows - start)
            offset = extent.offset_bytes + start * row_bytes
            lead = offset % 4096
            file.read_into(buffer.address + lead, offset, count * row_bytes)
            # A copy would double the memory; the view is dropped before the buffer is written again.
            chunk = torch.frombuffer(buffer.view, dtype=torch.uint8, offset=lead, count=count * row_bytes)
            if lead % dtype.itemsize:
                chunk = chunk.clone()
            yield chunk.view(dtype).view(count, *shape[1:]) if shape else chunk.view(dtype).view(())
            del chunk


def sample_rows(file: DirectFile, extent: TensorExtent, n_rows: int) -> torch.Tensor:
    """Return about `n_rows` rows of a matrix `[n, columns]`: blocks of 16, from all over it."""
    dtype, rows = TORCH_DTYPES[extent.dtype], extent.shape[0]
    row_bytes = extent.n_bytes // rows
    n_blocks = min(-(-n_rows // ROW_MULTIPLE), -(-rows // ROW_MULTIPLE))
    blocks = []
    for number in range(n_blocks):
        start = number * (rows - 1) // n_blocks // ROW_MULTIPLE * ROW_MULTIPLE
        count = min(ROW_MULTIPLE, rows - start)
        read = bytearray(file.read_bytes(extent.offset_bytes + start * row_bytes, count * row_bytes))
        blocks.append(torch.frombuffer(read, dtype=dtype).view(count, -1))
    return torch.cat(blocks)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data.cast("B")


def side_files(directory: Path) -> list[Path]:
    """Return the small files of a checkpoint that are not weights: configuration, tokenizer, processors."""
    return [
        path
        for path in sorted(directory.iterdir())
        if path.is_file() and not _WEIGHT_FILE.match(path.name) and os.path.getsize(path) <= _SIDE_FILE_MOST_BYTES
    ]
