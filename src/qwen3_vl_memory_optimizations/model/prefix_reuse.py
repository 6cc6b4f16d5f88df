"""A prompt that begins as an earlier one goes on where that left off: keys and values of the beginning are kept.

`generate` looks the prompt up block by block (see `prompt_blocks`), fills the new cache of transformers with the keys
and values of the longest beginning that is known, and computes the rest. Positions are those of the whole prompt,
pictures included; pictures inside the beginning are not encoded. Logits are those that transformers gives when it
continues from a cache of its own; a prompt computed in one piece may differ from that by rounding.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..cache import CacheItem, HierarchicalCacheSystem, digest
from ..errors import MemoryBudgetExceeded
from .identity import ModelIdentity
from .prompt_blocks import Block, Span, cut, find_spans
from .vision_reuse import VisionReuse

_KIND = "prefix"
_CHEAPER = 0.9
_LEAST_MEASURED_TOKENS = 64
"""Fewer tokens take longer each: a rate measured on them would promise too much."""
_CACHE_NAMES = ("cache", "past_key_values")  # since transformers 5.24, and before
_PICTURES = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
_FOREIGN = (
    "inputs_embeds",
    "position_ids",
    "mm_encoder_outputs",
    "assistant_model",
    "custom_generate",
    "negative_prompt_ids",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
    "penalty_alpha",
    "dola_layers",
    "constraints",
    "force_words_ids",
    "prefill_chunk_size",
    "cache_implementation",
    "output_attentions",
    "output_hidden_states",
    "token_healing",
    "guidance_scale",
    *_CACHE_NAMES,
)
"""Ways to generate that bring a cache of their own, or look at more than the last token: they are left as they are."""


@dataclass(slots=True)
class _Run:
    """One call of `generate`.

    Attributes:
        ids: the prompt.
        spans: its pictures.
        root: of the keys of its blocks.
        blocks: of the prompt.
        known: the beginning that is known: keys and values of each block, `[2 * layers, heads, tokens, head_dim]`.
        past: how many tokens that is.
        cache: that of transformers, once it is made.
    """

    ids: list[int]
    spans: list[Span]
    root: str
    blocks: list[Block]
    known: list[torch.Tensor] = field(default_factory=list)
    past: int = 0
    cache: Any = None


def attach_prefix_reuse(
    model: Any,
    cache: HierarchicalCacheSystem,
    identity: ModelIdentity,
    vision: VisionReuse | None,
    reserve: Callable[[int], None],
    kv_form: str,
) -> None:
    """Let `generate` of a model begin behind what it knows; a model without `generate` is left as it is.

    Args:
        model: of transformers.
        cache: where keys and values are kept.
        identity: of the model.
        vision: gives the keys of pictures; `None`: prompts with pictures are computed whole.
        reserve: sets memory aside for keys and values that come back; raises `MemoryBudgetExceeded`.
        kv_form: how the caches of `generate` keep keys and values: what comes out of one form is not used for another.
    """
    needed = ("generate", "_prepare_cache_for_generation", "_prepare_position_ids_for_generation", "_prefill")
    if not all(hasattr(model, name) for name in needed):
        return
    reuse = PrefixReuse(model, cache, identity, vision, reserve, kv_form)
    model.generate = reuse.wrap_generate(model.generate)
    model._prepare_cache_for_generation = reuse.wrap_prepare(model._prepare_cache_for_generation)
    model._prefill = reuse.wrap_prefill(model._prefill)


class PrefixReuse:
    """Looks beginnings of prompts up, and keeps them. Arguments: see `attach_prefix_reuse`."""

    def __init__(
        self,
        model: Any,
        cache: HierarchicalCacheSystem,
        identity: ModelIdentity,
        vision: VisionReuse | None,
        reserve: Callable[[int], None],
        kv_form: str,
    ) -> None:
        self._model, self._cache, self._identity = model, cache, identity
        self._vision, self._reserve, self._kv_form = vision, reserve, kv_form
        self._local = threading.local()

    # --- the three places in transformers -----------------------------------------------------------------------------

    def wrap_generate(self, plain: Any) -> Any:
        """Return `generate` that begins behind what is known, and keeps what was computed."""
        signature = inspect.signature(plain)

        @functools.wraps(plain)
        def generate(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind_partial(*args, **kwargs).arguments
            arguments = {**bound, **bound.get("kwargs", {})}
            arguments.pop("kwargs", None)
            run = None if getattr(self._local, "run", None) is not None else self._begin(arguments)
            if run is None:
                return plain(*args, **kwargs)
            if run.past:
                arguments = self._behind(run, arguments)
            with self._running(run):
                result = plain(**arguments)
            self._keep(run, result)
            return result

        return generate

    def wrap_prepare(self, plain: Any) -> Any:
        """Return `_prepare_cache_for_generation` that fills the cache with what is known."""

        @functools.wraps(plain)
        def prepare(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            result = plain(generation_config, model_kwargs, *args, **kwargs)
            run = getattr(self._local, "run", None)
            if run is not None and run.cache is None:
                made = (model_kwargs.get(name) for name in _CACHE_NAMES)
                run.cache = next((each for each in made if each is not None), None)
                _fill(run)
            return result

        return prepare

    def wrap_prefill(self, plain: Any) -> Any:
        """Return `_prefill` that notes how long a token takes."""

        @functools.wraps(plain)
        def prefill(*args: Any, **kwargs: Any) -> Any:
            run = getattr(self._local, "run", None)
            start_s = time.perf_counter()
            result = plain(*args, **kwargs)
            if run is not None and len(run.ids) - run.past >= _LEAST_MEASURED_TOKENS:
                seconds = time.perf_counter() - start_s
                self._cache.note_compute_s(self._kind(run), len(run.ids) - run.past, seconds)
            return result

        return prefill

    @contextlib.contextmanager
    def _running(self, run: _Run) -> Iterator[None]:
        self._local.run = run
        try:
            yield
        finally:
            self._local.run = None
            run.known.clear()

    # --- before -------------------------------------------------------------------------------------------------------

    def _begin(self, arguments: Mapping[str, Any]) -> _Run | None:
        """Return what is known of a call, or `None` where it is one that is left as it is."""
        ids = arguments.get("input_ids", arguments.get("inputs"))
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[0] != 1 or ids.is_floating_point():
            return None
        mask = arguments.get("attention_mask")
        if self._is_foreign(arguments) or (mask is not None and (mask.shape != ids.shape or not bool(mask.all()))):
            return None
        config = self._model.config
        attention = getattr(config.get_text_config(), "_attn_implementation", None)
        root = self._identity.of(self._model, _KIND, attention, self._kv_form)
        if root is None:
            return None
        tokens = ids[0].tolist()
        spans = self._spans(tokens, arguments)
        if spans is None:
            return None
        run = _Run(tokens, spans, root, cut(tokens, spans, root))
        self._look_up(run)
        return run

    def _is_foreign(self, arguments: Mapping[str, Any]) -> bool:
        """Whether a call generates in a way that is left as it is."""

        def setting(name: str) -> Any:
            sources = (arguments.get("generation_config"), self._model.generation_config)
            values = (arguments.get(name), *(getattr(source, name, None) for source in sources))
            return next((value for value in values if value is not None), None)

        several = any((setting(name) or 1) > 1 for name in ("num_beams", "num_return_sequences"))
        return several or setting("use_cache") is False or any(setting(name) not in (None, False) for name in _FOREIGN)

    def _spans(self, tokens: list[int], arguments: Mapping[str, Any]) -> list[Span] | None:
        config = self._model.config
        grids: dict[str, list[list[int]]] = {}
        keys: dict[str, list[str]] = {}
        for modality, (pixels, grid) in _PICTURES.items():
            if arguments.get(pixels) is None and arguments.get(grid) is None:
                continue
            if self._vision is None or arguments.get(pixels) is None or arguments.get(grid) is None:
                return None
            found = self._vision.keys(arguments[pixels], arguments[grid])
            if found is None or arguments.get("mm_token_type_ids") is None:
                return None
            grids[modality], keys[modality] = arguments[grid].tolist(), found
        token_ids = {name: getattr(config, f"{name}_token_id", None) for name in _PICTURES}
        known = {name: token_id for name, token_id in token_ids.items() if token_id is not None}
        merge = self._model.model.visual.spatial_merge_size if grids else 1
        return find_spans(tokens, known, grids, keys, merge)

    def _look_up(self, run: _Run) -> None:
        """Find the longest beginning that is known and worth loading; at least one token is left to compute."""
        blocks, load_s = [], 0.0
        for block in run.blocks:
            seconds = self._cache.predict_load_s(block.key) if block.stop < len(run.ids) else None
            if seconds is None:
                break
            blocks.append(block)
            load_s += seconds
        blocks = _whole(blocks)
        compute_s = self._cache.predict_compute_s(self._kind(run), blocks[-1].stop if blocks else 0)
        if not blocks or (compute_s is not None and load_s > _CHEAPER * compute_s):
            return
        try:
            self._reserve(2 * self._kv_bytes(blocks[-1].stop))
        except MemoryBudgetExceeded:
            return
        found: dict[str, torch.Tensor] = {}
        for block in reversed(blocks):  # what comes first is to leave last
            item = self._cache.get(
                block.key, compute_s=self._cache.predict_compute_s(self._kind(run), block.n_tokens), copy=False
            )
            kv = None if item is None else item.tensors.get("kv")
            if kv is not None and kv.shape == self._kv_shape(block.n_tokens) and kv.dtype == self._model.dtype:
                found[block.key] = kv
        there = []
        for block in blocks:
            if block.key not in found:
                break
            there.append(block)
        there = _whole(there)
        if there:
            run.known = [found[block.key] for block in there]
            run.past = there[-1].stop

    def _behind(self, run: _Run, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments with the positions of the whole prompt, and with the pictures of the rest only."""
        ids: torch.Tensor = arguments["input_ids"] if "input_ids" in arguments else arguments["inputs"]
        shown = {"mm_token_type_ids", *(name for names in _PICTURES.values() for name in names[1:])}
        given = {name: arguments[name] for name in shown if arguments.get(name) is not None}
        given["attention_mask"] = torch.ones_like(ids)
        changed = dict(arguments)
        changed["position_ids"] = self._model._prepare_position_ids_for_generation(ids, given)
        for modality, (pixels, grid) in _PICTURES.items():
            left = [span.index for span in run.spans if span.modality == modality and span.start >= run.past]
            if arguments.get(pixels) is None or len(left) == len(arguments[grid]):
                continue
            parts = arguments[pixels].split(arguments[grid].prod(-1).tolist())
            changed[pixels] = torch.cat([parts[index] for index in left]) if left else None
            changed[grid] = arguments[grid][left] if left else None
        return {name: value for name, value in changed.items() if value is not None or name not in _names_of_pictures()}

    # --- after --------------------------------------------------------------------------------------------------------

    def _keep(self, run: _Run, result: Any) -> None:
        """Offer the blocks of the prompt to the cache, and in memory those of the answer: a next turn repeats both."""
        if run.cache is None:
            return
        sequence = getattr(result, "sequences", result)[0].tolist()
        n_tokens = min(len(sequence), int(run.cache.get_seq_length()))
        blocks = run.blocks
        if not any(token in self._picture_tokens() for token in sequence[len(run.ids) :]):
            blocks = cut(sequence[:n_tokens], run.spans, run.root)
        persists = self._identity.persists(self._model)
        layers = None
        for block in reversed(blocks):  # what comes first is to leave last
            if block.stop > n_tokens or self._cache.predict_load_s(block.key) is not None:
                continue
            layers = layers or [_states(layer) for layer in run.cache.layers]
            kv = torch.cat([states[:, :, block.start : block.stop] for layer in layers for states in layer])
            saved_s = self._cache.predict_compute_s(self._kind(run), block.n_tokens) or 0.0
            of_prompt = block.stop <= len(run.ids)
            self._cache.put(
                block.key, CacheItem({"kv": kv}), saved_s=saved_s, kind=self._kind(run), persist=persists and of_prompt
            )

    # --- sizes --------------------------------------------------------------------------------------------------------

    def _kind(self, run: _Run) -> str:
        return f"{_KIND} {digest(run.root)[:8]}"

    def _kv_shape(self, n_tokens: int) -> tuple[int, ...]:
        text = self._model.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return (2 * text.num_hidden_layers, heads, n_tokens, head_dim)

    def _kv_bytes(self, n_tokens: int) -> int:
        return torch.Size(self._kv_shape(n_tokens)).numel() * self._model.dtype.itemsize

    def _picture_tokens(self) -> set[int]:
        return {getattr(self._model.config, f"{name}_token_id", -1) for name in _PICTURES}


def _whole(blocks: list[Block]) -> list[Block]:
    """Return the blocks up to the last one behind which a prompt may be continued."""
    while blocks and not blocks[-1].ends_whole:
        blocks = blocks[:-1]
    return blocks


def _fill(run: _Run) -> None:
    """Put what is known into the new cache."""
    if run.cache is not None and run.known:
        for index in range(len(run.known[0]) // 2):
            keys, values = (torch.cat([kv[2 * index + which] for kv in run.known], dim=-2)[None] for which in (0, 1))
            run.cache.update(keys, values, index)
    run.known.clear()


def _states(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values of a layer of a cache, `[1, heads, tokens, head_dim]` each."""
    decoded = getattr(layer, "decoded", None)  # of a layer that keeps an encoded form
    return decoded() if decoded is not None else (layer.keys, layer.values)


def _names_of_pictures() -> set[str]:
    return {name for names in _PICTURES.values() for name in names}
