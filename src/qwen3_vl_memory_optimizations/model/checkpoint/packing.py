"""Pack a Hugging Face checkpoint: encoded, in order of use, with each page ready for a direct read."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from ...compression import Codec, Encoded, Segment, columns_of, create_codec
from ...config import MemoryConfig
from ...errors import CheckpointError, CodecError, ConfigurationError, MemoryBudgetExceeded, format_bytes
from ...process import rss_bytes
from ...storage import CONFIG_FILE, Checkpoint, PackedEntry, PackedLayout, PackedWriter, TensorExtent, pack_lock
from ..sources.uses import note_use
from .calibrated_encoding import CalibratedEncoding, Stored
from .formats import (
    PLAIN_FLOATS,
    TORCH_DTYPES,
    LogicalTensor,
    config_of,
    declared_dtype,
    needs_packing,
    open_checkpoint,
    side_files,
    weights_of,
)
from .packed_encodings import ENCODINGS_FILE, PackedEncodings
from .plan import CompressionPlan
from .skeleton import WeightSite, build_skeleton, codec_for, rows_per_page, weight_sites

Progress = Callable[[str, int, int], None]
"""Called with a description, the bytes done and the total bytes."""

CODECS_KEY = "qwen3vl_mem.codecs"
SHAPES_KEY = "qwen3vl_mem.shapes"
"""Metadata of packed checkpoints: tensor name -> codec; and -> shape, if it differs from the first segment's."""
DTYPES_KEY = "qwen3vl_mem.dtypes"
"""Metadata of packed checkpoints: name of an encoded tensor -> its dtype in the source, as spelled by safetensors."""
PLAN_KEY = "qwen3vl_mem.plan"
"""Metadata of checkpoints packed by a plan: its fingerprint."""
CALIBRATION_KEY = "qwen3vl_mem.calibration"
"""Metadata of checkpoints whose encoding compensates errors: a description of the inputs."""
_DECODING_BYTES = 96 << 20
"""Memory to decode and encode a few chunks, besides what the reader of a weight holds (measured)."""

logger = logging.getLogger(__name__)

SAFETENSORS_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Calibration:
    """Inputs for which weights are encoded, if their codecs compensate errors.

    Attributes:
        description: of the inputs; another replaces the result of this one.
        chosen: whether the user chose them; otherwise the result of any others is as good.
        batch: returns the arguments of one forward, given the shapes of the large weights.
    """

    description: str
    chosen: bool
    batch: Callable[[Mapping[str, tuple[int, ...]]], Mapping[str, torch.Tensor]]

    def suits(self, directory: Path) -> bool:
        """Return whether a packed checkpoint was encoded for inputs like these."""
        found = Checkpoint.open(directory).metadata.get(CALIBRATION_KEY)
        return found == self.description if self.chosen else found is not None


def segment_name(tensor_name: str, segment: str, is_first: bool) -> str:
    """Return the name of a segment in a packed checkpoint; the first segment has the tensor's name."""
    return tensor_name if is_first else f"{tensor_name}.{segment}"


def original_dtypes(checkpoint: Checkpoint) -> dict[str, torch.dtype]:
    """Return the dtypes that a packed checkpoint's encoded tensors had in its source.

    Checkpoints packed before these were recorded: the dtype that `config.json` declares.
    """
    if DTYPES_KEY in checkpoint.metadata:
        return {name: TORCH_DTYPES[dtype] for name, dtype in json.loads(checkpoint.metadata[DTYPES_KEY]).items()}
    codecs = json.loads(checkpoint.metadata.get(CODECS_KEY, "{}"))
    return dict.fromkeys(codecs, declared_dtype(checkpoint.config) or torch.float32)


def packed_directory(source: Checkpoint, codec: str, config: MemoryConfig) -> Path:
    """Return the path of a checkpoint's packed form, existing or not."""
    name = codec if codec == "auto" else create_codec(codec).stored_name
    return config.packed_dir / f"{source.name}-{source.fingerprint()[:12]}-{name}"


def plan_path(source: Checkpoint, config: MemoryConfig) -> Path:
    """Return the path of a checkpoint's plan: beside the packed form, `….plan.json`."""
    return plan_path_of(packed_directory(source, "auto", config))


def plan_path_of(packed: Path) -> Path:
    """Return the path of a packed checkpoint's plan, existing or not."""
    return packed.with_name(f"{packed.name}.plan.json")


def find_packed(source: Checkpoint, codec: str, config: MemoryConfig) -> Path | None:
    """Return the directory of the packed form, if it exists and matches the plan beside it.

    Raises:
        ConfigurationError: the stored plan cannot be read.
    """
    directory, path = packed_directory(source, codec, config), plan_path(source, config)
    plan = CompressionPlan.load(path) if codec == "auto" and path.is_file() else None
    return directory if _is_packed(directory, plan) else None


def pack_checkpoint(
    source_dir: str | Path | Checkpoint,
    *,
    codec: str = "int8",
    plan: CompressionPlan | None = None,
    calibration: Calibration | None = None,
    config: MemoryConfig | None = None,
    progress: Progress | None = None,
) -> Path:
    """Pack a checkpoint, unless it is packed already.

    Holds a few chunks of one tensor at a time; for GPTQ and AWQ also the codes of one matrix. Already quantized weights
    are decoded as they are read. An interrupted run resumes where it stopped; of two processes, one does the work.

    Args:
        source_dir: a checkpoint, or a path that `open_checkpoint` accepts.
        codec: encodes large weights if there is no plan.
        plan: a codec per weight, stored beside the result before the work begins; replaces the result of another plan
            for this checkpoint.
        calibration: inputs for codecs that compensate errors; replaces the result of others.
        config: locates the packed checkpoints.
        progress: called as the work proceeds.

    Returns:
        The directory of the packed checkpoint; the source if the plan encodes nothing.

    Raises:
        CheckpointError: the source is not a usable checkpoint.
        ConfigurationError: the plan belongs to another checkpoint.
        InsufficientDiskSpaceError: the result does not fit on the disk.
        MemoryBudgetExceeded: decoding a weight does not fit `ram_budget`.
    """
    config = config or MemoryConfig()
    source = open_checkpoint(source_dir)
    if source.packed:
        raise ConfigurationError(f"{source.directory} is already packed; load it directly")
    final_dir = packed_directory(source, "auto" if plan else codec, config)
    if _is_packed(final_dir, plan, calibration):
        _keep(plan, plan_path(source, config))
        return final_dir
    skeleton = build_skeleton(source, torch.float32)
    sites = weight_sites(skeleton)
    codecs: dict[str, str] = {}
    if plan is not None:
        plan.require_names(site.name for site in sites if site.managed)
        codecs = {name: weight.codec for name, weight in plan.weights.items()}
        codec = MemoryConfig().unmeasured_codec()
        if plan.encodes_nothing() and not needs_packing(source):
            _keep(plan, plan_path(source, config))
            return source.directory
    stored = _stored(source, sites, lambda name: create_codec(codecs.get(name, codec)))
    _require_memory(stored, config)
    report = progress or (lambda description, done, total: None)
    if needs_packing(source):
        logger.info("%s: cannot be paged from its own files; decoding once into %s", source.directory, final_dir)
    final_dir.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with pack_lock(final_dir):
        if not _is_packed(final_dir, plan, calibration):
            _keep(plan, plan_path(source, config))
            _remove_stale(final_dir)
            given = None if calibration is None else _Given(skeleton, sites, calibration)
            _write(source, stored, plan, given, final_dir, report)
    note_use(config, source, Checkpoint.open(final_dir))
    return final_dir


def _keep(plan: CompressionPlan | None, path: Path) -> None:
    """Store a plan, unless it is stored already: packed checkpoints may be on a read-only disk."""
    if plan is None:
        return
    try:
        kept = CompressionPlan.load(path)
    except ConfigurationError:
        kept = None  # missing or unreadable
    if kept != plan:
        plan.save(path)


def _is_packed(directory: Path, plan: CompressionPlan | None, calibration: Calibration | None = None) -> bool:
    """Return whether a directory exists and was packed by this plan and for these inputs, if they are given."""
    if not directory.is_dir() or not (calibration is None or calibration.suits(directory)):
        return False
    return plan is None or Checkpoint.open(directory).metadata.get(PLAN_KEY) == plan.fingerprint()


def _remove_stale(final_dir: Path) -> None:
    """Remove unfinished packings of the same source from before it changed; they can never be used again."""
    stem = re.sub(r"-[0-9a-f]{12}-\w+$", "", final_dir.name)
    for other in final_dir.parent.glob(f"{stem}-*.partial"):
        if other.name != f"{final_dir.name}.partial" and re.fullmatch(
            re.escape(stem) + r"-[0-9a-f]{12}-\w+\.partial", other.name
        ):
            shutil.rmtree(other, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _Given:
    """A calibration, and what its inputs pass through."""

    skeleton: nn.Module
    sites: list[WeightSite]
    calibration: Calibration


def _stored(source: Checkpoint, sites: list[WeightSite], codec_of: Callable[[str], Codec]) -> Stored:
    """Return all tensors: the large ones in order of use, then the others."""
    raw = create_codec("none")
    weights = weights_of(source)
    stored: dict[str, tuple[LogicalTensor, Codec]] = {}
    for site in sorted(sites, key=lambda site: not site.managed):
        weight = find(source, weights, site)
        codec = raw
        if site.managed:
            codec = codec_for(site, weight.dtype, codec_of(site.name), create_codec, weight.whole)
        stored[site.name] = (weight, codec)
    return stored


def _require_memory(stored: Stored, config: MemoryConfig) -> None:
    """Reject decoding weights that do not fit the budget, before anything is written."""
    largest, _ = max(stored.values(), key=lambda entry: entry[0].held_bytes)
    if config.ram_budget is None or not largest.held_bytes:
        return
    available = config.ram_budget - rss_bytes()
    required = largest.held_bytes + _DECODING_BYTES
    if required > available:
        raise MemoryBudgetExceeded(
            f"decoding {largest.name} needs {format_bytes(required)}, but ram_budget leaves "
            f"{format_bytes(max(0, available))}; pack once without ram_budget (qwen3vl-mem pack), then load within it",
            requested_bytes=required,
            available_bytes=max(0, available),
            budget_bytes=config.ram_budget,
            owner="packing",
        )


Found = TypeVar("Found", TensorExtent, LogicalTensor)


def find(source: Checkpoint, tensors: Mapping[str, Found], site: WeightSite) -> Found:
    """Return a parameter of a checkpoint.

    Args:
        source: the checkpoint, for errors.
        tensors: its weights (`weights_of`) or, to page them from their files, its `tensors`.
        site: the parameter.

    Raises:
        CheckpointError: it is missing, not a float, or has another shape.
    """
    found = next((tensors[name] for name in (site.name, *site.aliases) if name in tensors), None)
    if found is None:
        raise CheckpointError(
            f"{source.directory}: the tensor {site.name!r} is missing; the checkpoint is incomplete, or its "
            "architecture differs from its config.json: download it again",
            path=source.directory,
        )
    if source.packed:
        return found
    stored = found.dtype if isinstance(found, TensorExtent) else found.stored_as
    if stored not in PLAIN_FLOATS:
        raise CheckpointError(
            f"{found.path}: {found.name!r} has the type {stored}: it is quantized, but neither config.json nor nearby "
            "tensors describe how; use the original model in 16 bits",
            path=found.path,
        )
    if tuple(found.shape) != site.shape:
        raise CheckpointError(
            f"{found.path}: {found.name!r} has shape {list(found.shape)}, but config.json requires {list(site.shape)}",
            path=found.path,
        )
    return found


def _write(
    source: Checkpoint,
    stored: Stored,
    plan: CompressionPlan | None,
    given: _Given | None,
    final_dir: Path,
    report: Progress,
) -> None:
    entries = []
    for name, (weight, codec) in stored.items():
        for index, segment in enumerate(codec.segments(weight.shape, weight.dtype)):
            paged = index == 0 and len(weight.shape) >= 2
            page_bytes = 0
            if paged:
                rows = rows_per_page(segment.shape, segment.dtype.itemsize)
                page_bytes = rows * columns_of(segment.shape) * segment.dtype.itemsize
            dtype = SAFETENSORS_DTYPES[segment.dtype]
            shape = segment.shape if codec.name != "none" else weight.shape
            entries.append(
                PackedEntry(segment_name(name, segment.name, index == 0), dtype, shape, segment.n_bytes, page_bytes)
            )
    metadata = {
        "format": "pt",
        CODECS_KEY: json.dumps(
            {name: codec.stored_name for name, (_, codec) in stored.items() if codec.name != "none"}
        ),
        DTYPES_KEY: json.dumps(
            {name: weight.stored_as for name, (weight, codec) in stored.items() if codec.name != "none"}
        ),
        "qwen3vl_mem.source": source.fingerprint(),
    }
    if plan is not None:
        metadata[PLAN_KEY] = plan.fingerprint()
    if given is not None:
        metadata[CALIBRATION_KEY] = given.calibration.description
    shapes = {
        name: weight.shape
        for name, (weight, codec) in stored.items()
        if codec.segments(weight.shape, weight.dtype)[0].shape != weight.shape
    }
    if shapes:
        metadata[SHAPES_KEY] = json.dumps({name: list(shape) for name, shape in shapes.items()})
    total = sum(weight.n_bytes for weight, _ in stored.values())
    done = 0
    encodings = PackedEncodings()
    replace = plan is not None or given is not None
    with PackedWriter(final_dir, PackedLayout(entries), metadata, replace=replace) as writer:
        complete = writer.open()
        if given is not None:
            _encode_calibrated(given, stored, writer, complete, encodings, report)
        for name, (weight, codec) in stored.items():
            segments = codec.segments(weight.shape, weight.dtype)
            names = [segment_name(name, segment.name, index == 0) for index, segment in enumerate(segments)]
            if not all(part in complete for part in names):
                small: dict[str, list[torch.Tensor]] = {}
                chunks = _encoded_chunks(name, weight, codec, small, segments[0].name, encodings)
                if names[0] in complete:
                    for _ in chunks:  # write the small segments of this tensor, which are still missing
                        pass
                else:
                    writer.append(names[0], chunks)
                for part, segment in zip(names[1:], segments[1:], strict=True):
                    if part not in complete:
                        values = small[segment.name]
                        writer.append(part, [_bytes(values[0] if segment.shared else torch.cat(values))])
            elif not codec.lossless and name not in encodings.errors:  # lost by an interruption
                next(_encoded_chunks(name, weight, codec, {}, segments[0].name, encodings))
            done += weight.n_bytes
            report("packing", done, total)
        texts = {ENCODINGS_FILE: encodings.to_json()}
        config = config_of(source)
        if config is not None:
            texts[CONFIG_FILE] = json.dumps(config, indent=2)
        writer.finish(side_files(source), texts)


def _encode_calibrated(
    given: _Given,
    stored: Stored,
    writer: PackedWriter,
    complete: set[str],
    encodings: PackedEncodings,
    report: Progress,
) -> None:
    """Write the weights that the calibration's inputs reach."""

    def segments_of(name: str) -> list[tuple[str, Segment]]:
        weight, codec = stored[name]
        segments = codec.segments(weight.shape, weight.dtype)
        return [(segment_name(name, segment.name, index == 0), segment) for index, segment in enumerate(segments)]

    def read(name: str) -> Encoded | None:
        parts = segments_of(name)
        if not all(part in complete for part, _ in parts):
            return None
        return {
            segment.name: torch.frombuffer(bytearray(writer.read(part)), dtype=segment.dtype).view(segment.shape)
            for part, segment in parts
        }

    def write(name: str, encoded: Encoded) -> None:
        for part, segment in segments_of(name):
            writer.append(part, [_bytes(encoded[segment.name])])
            complete.add(part)

    shapes = {name: weight.shape for name, (weight, codec) in stored.items() if codec.compensates}
    batch = given.calibration.batch(shapes)
    CalibratedEncoding(
        given.skeleton,
        given.sites,
        stored,
        read=read,
        write=write,
        progress=lambda done, total: report("calibrating", done, total),
        encodings=encodings,
    ).run(batch)


def _encoded_chunks(
    name: str,
    weight: LogicalTensor,
    codec: Codec,
    small: dict[str, list[torch.Tensor]],
    first: str,
    encodings: PackedEncodings,
) -> Iterator[memoryview]:
    """Yield the bytes of the first segment, some rows at a time; the others are collected in `small`."""
    for rows in weight.row_chunks():
        try:
            encoded = encodings.encode(name, codec, rows)
        except CodecError as error:
            raise CheckpointError(
                f"{weight.path}: {name}: {error}; the checkpoint is damaged: download it again", path=weight.path
            ) from error
        yield _bytes(encoded.pop(first))
        for segment, values in encoded.items():
            small.setdefault(segment, []).append(values)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data.cast("B")
