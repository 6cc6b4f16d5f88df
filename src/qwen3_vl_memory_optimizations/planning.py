"""Choose a codec per large weight by its effect on the model's outputs, and pack accordingly (`codec="auto"`)."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch

from .compression import CodecSpeeds, CompressionMethodSelector, create_codec
from .compression.selection import TOLERANCES, WEIGHT_CANDIDATES
from .config import MemoryConfig
from .errors import CheckpointError, MemoryBudgetExceeded, format_bytes
from .model.checkpoint.codec_speeds import codec_speeds
from .model.checkpoint.fitting import fit
from .model.checkpoint.formats import LogicalTensor, needs_packing, open_checkpoint, weights_of
from .model.checkpoint.loading import WeightLoader
from .model.checkpoint.packing import Calibration, Progress, find, find_packed, pack_checkpoint, plan_path
from .model.checkpoint.plan import CompressionPlan, PlannedWeight
from .model.checkpoint.skeleton import WeightSite, build_skeleton, compute_dtype_of, weight_sites
from .optimizer import MemoryOptimizer
from .process import rss_bytes, usable_memory
from .profiles import configure
from .storage import Checkpoint

logger = logging.getLogger(__name__)

_WORTH_MEASURING_BYTES = 64 * 2**20
"""Below this size, loading takes less time than measuring the codec speeds."""
_MOST_TOKENS = 8192
"""Of calibration inputs; twice as many gained little (measured)."""
_ACTIVATIONS = 5
"""Values of each token held at once, in units of the widest layer (measured)."""
_STATISTICS_MATRICES = 3
"""Held at once, of as many rows and columns as the widest input has."""
_ENCODING_BYTES = 400 << 20
_SAMPLE_ROWS = 256
_VOCABULARY_CANDIDATES = ("none", "fp16", "int8_rotated", "int8")
"""Rows of an embedding are looked up one by one."""
_SWITCHES = {
    "enable_int8_quantization": ("int8_rotated", "int8"),
    "enable_sparse_compression": ("sparse",),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Need:
    """What a compression plan must achieve; at most one of the first two.

    Attributes:
        most_bytes: what the large weights may take together.
        bits: the same, as an average per weight.
        tolerance: the largest relative error of a weight's outputs, if each is chosen by itself.
    """

    most_bytes: int | None = None
    bits: float | None = None
    tolerance: float | None = None

    def bytes_for(self, source: Checkpoint) -> int | None:
        """Return the most bytes of a checkpoint's large weights, if they are limited."""
        if self.bits is None:
            return self.most_bytes
        sites = weight_sites(build_skeleton(source, torch.float32))
        return int(sum(math.prod(site.shape) for site in sites if site.managed) * self.bits / 8)

    def is_met_by(self, plan: CompressionPlan, source: Checkpoint) -> bool:
        """Return whether a plan was made for this need."""
        return (plan.most_bytes, plan.tolerance) == (self.bytes_for(source), _tolerance(self))


def _tolerance(need: Need | None) -> float:
    return TOLERANCES["weights"] if need is None or need.tolerance is None else need.tolerance


def pack_model(
    directory: str | Path | Checkpoint,
    config: MemoryConfig,
    *,
    plan: CompressionPlan | None = None,
    calibration: Path | None = None,
    fast: bool = False,
    need: Need | None = None,
    progress: Progress | None = None,
) -> Path:
    """Pack a checkpoint once, as configured; `codec="auto"` first makes a plan and stores it (`plan_path`).

    Codecs that compensate errors (`int4`) encode each weight for the inputs that it gets from calibration inputs.

    Args:
        directory: a checkpoint, or a path that `open_checkpoint` accepts.
        config: the codec, the budget for making the plan, and the location of packed checkpoints.
        plan: pack by this plan instead; replaces the result of another plan.
        calibration: a directory of images and `.txt` files to calibrate with instead of the shipped ones; with `auto`,
            for a new plan.
        fast: compensate no errors, which takes a tenth of the time and loses more.
        need: what a plan must achieve; makes a new one, unless the present one was made for the same.
        progress: called with a description, the amount done and the total.

    Returns:
        The directory to load: the packed one, or the source if no weight is encoded. Checkpoints that are already
        quantized are always packed, because they cannot be paged from their own files.

    Raises:
        CheckpointError: the source is not a usable checkpoint.
        ConfigurationError: the plan belongs to another checkpoint, or there is nothing to calibrate on.
        InsufficientDiskSpaceError: the result does not fit on the disk.
    """
    config = configure(config)
    codec = config.weight_codec()
    source = open_checkpoint(directory)
    if codec == "none" and plan is None and not needs_packing(source):
        return source.directory
    if codec != "auto" and plan is None:
        inputs = None if fast else _calibration(source, config, calibration, (codec,))
        return pack_checkpoint(source, codec=codec, calibration=inputs, config=config, progress=progress)
    path = plan_path(source, config)
    if plan is None and calibration is None:
        kept = CompressionPlan.load(path) if path.is_file() else None
        if need is None or (kept is not None and need.is_met_by(kept, source)):
            packed = find_packed(source, "auto", config)
            if packed is not None:
                return packed
            plan = kept  # the packing was interrupted and resumes by it, or the plan was edited since
    if plan is None:
        plan = make_plan(source, config, calibration=calibration, need=need, progress=progress)
    codecs = {weight.codec for weight in plan.weights.values()}
    inputs = None if fast else _calibration(source, config, calibration, codecs)
    return pack_checkpoint(source, plan=plan, calibration=inputs, config=config, progress=progress)


def _calibration(
    source: Checkpoint, config: MemoryConfig, samples: Path | None, codecs: Iterable[str]
) -> Calibration | None:
    """Return the inputs to encode for; `None` if no codec compensates errors, or the checkpoint has no tokenizer."""
    if not any(create_codec(codec).compensates for codec in codecs):
        return None
    from .model.checkpoint.calibration import digest  # imports transformers
    from .model.inputs.processor import load_tokenizer

    try:
        load_tokenizer(source.directory)
    except CheckpointError as error:
        logger.warning("encoding without calibration, which loses more: %s", str(error))
        return None
    description = "shipped images and text" if samples is None else f"{samples.resolve()}, {digest(samples)}"
    batch = partial(_windows, source.directory, config, samples)
    return Calibration(description, samples is not None, batch)


def _windows(
    directory: Path, config: MemoryConfig, samples: Path | None, shapes: Mapping[str, tuple[int, ...]]
) -> Mapping[str, torch.Tensor]:
    """Return as many calibration inputs as memory allows for weights of these shapes."""
    from .model.checkpoint.calibration import WINDOW_TOKENS, calibration_windows

    available = usable_memory()[1] if config.ram_budget is None else config.ram_budget - rss_bytes()
    widest, columns = max(max(shape) for shape in shapes.values()), max(shape[1] for shape in shapes.values())
    fixed = _STATISTICS_MATRICES * 4 * columns**2 + _ENCODING_BYTES
    tokens = min(_MOST_TOKENS, (available - fixed) // (_ACTIVATIONS * 4 * widest))
    if tokens < WINDOW_TOKENS:
        required = fixed + WINDOW_TOKENS * _ACTIVATIONS * 4 * widest
        raise MemoryBudgetExceeded(
            f"encoding with calibration needs {format_bytes(required)}, but {format_bytes(max(0, available))} are "
            "left; pack once without ram_budget (qwen3vl-mem pack), then load within it, or do without calibration "
            "(pack --fast), which loses more",
            requested_bytes=required,
            available_bytes=max(0, available),
            budget_bytes=config.ram_budget or available,
            owner="packing",
        )
    batch, description = calibration_windows(directory, samples, tokens)
    logger.info("calibrating with %s", description)
    return batch


def make_plan(
    source: Checkpoint,
    config: MemoryConfig,
    *,
    calibration: Path | None = None,
    need: Need | None = None,
    progress: Progress | None = None,
) -> CompressionPlan:
    """Choose a codec for each large weight of a checkpoint (see `CompressionMethodSelector`).

    A few images and a text run once through the unencoded model, paged within the budget. Each weight's candidates then
    multiply its recorded inputs, and the error of the outputs decides. If a checkpoint has no tokenizer, is already
    quantized, or does not run unencoded within the budget, the errors of the weights decide. 256 rows per weight are
    sampled.

    Args:
        source: not packed.
        config: the budget, and switches that exclude codecs.
        calibration: a directory with images and `.txt` files to use instead of the built-in ones.
        need: what the plan must achieve; with it, `int4` is a candidate too.
        progress: called with a description, the amount done and the total.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
        ConfigurationError: `calibration` holds nothing that the model accepts, or the weights cannot be as small as
            `need` says.
    """
    report = progress or (lambda description, done, total: None)
    dtype = compute_dtype_of(source.config, None, config)
    inputs, calibrated_on = _inputs(source, config, dtype, calibration, progress)
    speeds = codec_speeds(config) if source.total_bytes >= _WORTH_MEASURING_BYTES else None
    sites = [site for site in weight_sites(build_skeleton(source, dtype)) if site.managed]
    stored = weights_of(source)
    weights = {}
    for number, site in enumerate(sites):
        report("choosing codecs", number, len(sites))
        weights[site.name] = _chosen(find(source, stored, site), site, config, speeds, inputs, need)
    report("choosing codecs", len(sites), len(sites))
    most_bytes = None if need is None else need.bytes_for(source)
    if most_bytes is not None:
        weights = fit(weights, most_bytes)
    return CompressionPlan(
        weights=weights,
        tolerance=_tolerance(need),
        calibrated_on=calibrated_on,
        access="bytes" if speeds is None else "streamed",
        machine="" if speeds is None else speeds.machine,
        most_bytes=most_bytes,
    )


def _inputs(
    source: Checkpoint, config: MemoryConfig, dtype: torch.dtype, samples: Path | None, progress: Progress | None
) -> tuple[Mapping[str, torch.Tensor], str]:
    """Return the layers' inputs by weight name, and a description of their source."""
    from .model.checkpoint.calibration import (  # imports transformers
        calibration_batch,
        collect_inputs,
        most_input_bytes,
    )
    from .model.run.generation import attach_forward
    from .model.run.turns import Turns

    if needs_packing(source):
        logger.info("planning from the weights alone: the checkpoint cannot run unpacked")
        return {}, "nothing: the checkpoint is quantized, and cannot run unpacked"
    try:
        batch, description = calibration_batch(source.directory, samples)
    except CheckpointError as error:
        logger.info("planning from the weights alone: %s", str(error))
        return {}, "nothing: the checkpoint has no tokenizer"
    uncompressed = dataclasses.replace(config, codec="none", enable_cache_hierarchy=False)
    try:
        with MemoryOptimizer(memory_config=uncompressed) as optimizer:
            model = build_skeleton(source, dtype)
            WeightLoader(optimizer.pager, dtype, progress).from_checkpoint(model, source)
            optimizer.pager.reserve("calibration inputs", most_input_bytes(model, dtype))
            if config.ram_budget is not None:
                optimizer.measure_process()
                attach_forward(model, optimizer, Turns(), None)
            optimizer.pager.refit()
            return collect_inputs(model, batch), description
    except MemoryBudgetExceeded as error:
        logger.warning("planning from the weights alone: %s", str(error))
        return {}, "nothing: the budget is too small for the unencoded model"


def _chosen(
    weight: LogicalTensor,
    site: WeightSite,
    config: MemoryConfig,
    speeds: CodecSpeeds | None,
    inputs: Mapping[str, torch.Tensor],
    need: Need | None,
) -> PlannedWeight:
    candidates = _VOCABULARY_CANDIDATES if site.vocabulary else WEIGHT_CANDIDATES
    if need is not None and not site.vocabulary:
        candidates = (*candidates, "int4")
    left_out = {name for switch, names in _SWITCHES.items() if not getattr(config, switch) for name in names}
    selector = CompressionMethodSelector(
        speeds, {"weights": _tolerance(need)}, tuple(name for name in candidates if name not in left_out)
    )
    selection = selector.explain(
        weight.sample(_SAMPLE_ROWS),
        kind="weights",
        access="bytes" if speeds is None else "streamed",
        calibration=inputs.get(site.name),
        n_rows=site.shape[0],
    )
    return PlannedWeight.of(selection)
