"""Compute a run's share of the budget before it begins (`RunBudget`)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch

from ...errors import MemoryBudgetExceeded, format_bytes
from ...process import trim_heap
from ..compat import cache_of, vision_tower
from ..kv.cache import ManagedKVCache
from ..kv.sizes import BLOCK_TOKENS, FEW_TOKENS, TAIL_TOKENS
from ..layers.forward_memory import feature_bytes, text_bytes, vision_bytes, whole_prompt_bytes, with_heap
from .needs import LEAST_PIECE_TOKENS, STREAMED_BYTES, WORKSPACE_BYTES, RunNeeds, run_needs
from .pieces import PIECE_TOKENS

logger = logging.getLogger(__name__)

_PIECES = (PIECE_TOKENS, 768, 512, 384, 256, 192, 128, LEAST_PIECE_TOKENS)
_PIECE_SHARE = 0.5
"""Share of free memory for a piece. The rest caches weights, which otherwise are read once per piece."""
_WORTH_A_TRIM_BYTES = 16 << 20
_LAYERS_PER_TRIM = 4
_MANY_TOKENS = 512
_PIXELS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}


class RunBudget:
    """Reserves memory for a model's passes, and rejects runs that cannot finish within the budget.

    Args:
        model: a transformers model.
        optimizer: owns the budget.
        make_cache: returns an empty cache; `None`: transformers keeps keys and values.
        lowers: a pass that needs less memory than the one before returns the difference.
    """

    def __init__(self, model: Any, optimizer: Any, make_cache: Any, *, lowers: bool = True) -> None:
        self._model, self._optimizer, self._make_cache, self._lowers = model, optimizer, make_cache, lowers
        self._admitted = False
        self._features_bytes = 0  # of images and videos; `generate` holds them until it ends
        self._whole = not optimizer.pager.ledger.limited and optimizer.config.weight_codec() == "none"

    @property
    def _limited(self) -> bool:
        return self._optimizer.config.ram_budget is not None

    @property
    def _itemsize(self) -> int:
        return int(self._model.dtype.itemsize)

    # --- before a run -------------------------------------------------------------------------------------------------

    def admit(self, arguments: Mapping[str, Any]) -> None:
        """Reject a `generate` call that cannot finish.

        Args:
            arguments: of the call.

        Raises:
            MemoryBudgetExceeded: reports the bytes needed, the bytes available, and the smallest sufficient budget.
        """
        self._admitted = False
        if not self._limited or self._make_cache is None:
            return
        needs = self.needs(arguments)
        if needs is None:
            return
        optimizer = self._optimizer
        optimizer.measure_process()
        weights = sum(each.n_bytes for each in list(optimizer.pager.entries.values()) if each.kind == "weights")
        needs = dataclasses.replace(needs, streamed_bytes=min(STREAMED_BYTES, weights))
        workspace = min(WORKSPACE_BYTES, weights) - optimizer.pager.ledger.held_bytes("workspace")
        free = optimizer.free_for_activations() - max(0, workspace)
        if needs.memory_bytes > free:  # before refusing, return what only looks used
            optimizer.measure_process(release=True)
            free = optimizer.free_for_activations() - max(0, workspace)
        budget = optimizer.config.ram_budget
        if needs.memory_bytes > free:
            least = budget + needs.memory_bytes - free
            raise MemoryBudgetExceeded(
                f"{needs.prompt_tokens} prompt and {needs.new_tokens} new tokens in {needs.rows} sequence(s) need "
                f"{format_bytes(needs.memory_bytes)} besides weights; {format_bytes(max(0, free))} of the budget of "
                f"{format_bytes(budget)} are left; raise the budget to at least {format_bytes(least)}, or use smaller "
                "images or videos, or fewer sequences",
                requested_bytes=needs.memory_bytes,
                available_bytes=max(0, free),
                budget_bytes=budget,
                owner="generate",
            )
        self._require_swap(needs, free - needs.memory_bytes)
        self._admitted = True

    def ended(self) -> None:
        """Record that the call ended; later passes are not admitted."""
        self._admitted, self._features_bytes = False, 0

    def _require_swap(self, needs: RunNeeds, in_memory: int) -> None:
        """Reject keys and values that fit neither memory nor the SSD."""
        free = self._optimizer.pager.swap_free_bytes
        missing = needs.blocks_bytes - max(0, in_memory)
        if missing > free:
            raise MemoryBudgetExceeded(
                f"keys and values of {needs.prompt_tokens + needs.new_tokens} tokens need "
                f"{format_bytes(needs.blocks_bytes)}; {format_bytes(max(0, in_memory))} fit into memory and "
                f"{format_bytes(free)} onto the disk of the swap file; free disk space, allow a larger swap file, or "
                "raise the budget",
                requested_bytes=needs.blocks_bytes,
                available_bytes=max(0, in_memory) + free,
                budget_bytes=self._optimizer.config.ram_budget,
                owner="generate",
            )

    def needs(self, arguments: Mapping[str, Any]) -> RunNeeds | None:
        """Return the needs of a `generate` call with the smallest pieces, or `None` if unknown."""
        ids = arguments.get("input_ids", arguments.get("inputs"))
        ids = arguments.get("inputs_embeds") if ids is None else ids
        if not isinstance(ids, torch.Tensor) or ids.dim() < 2:
            return None

        def setting(name: str) -> Any:
            sources = (arguments.get("generation_config"), self._model.generation_config)
            values = (arguments.get(name), *(getattr(source, name, None) for source in sources))
            return next((value for value in values if value is not None), None)

        rows = int(ids.shape[0]) * max(setting("num_beams") or 1, setting("num_return_sequences") or 1)
        length = int(ids.shape[1])
        new = setting("max_new_tokens")
        if new is None:
            most = setting("max_length")
            new = max(1, most - length) if most is not None else 20
        mask = arguments.get("attention_mask")
        cache: ManagedKVCache = self._make_cache()
        lossless = cache.codec.lossless
        return run_needs(
            self._model.config,
            prompt_tokens=length,
            new_tokens=int(new),
            rows=rows,
            patches=_patches(arguments),
            itemsize=self._itemsize,
            tail_itemsize=self._itemsize if lossless else min(2, self._itemsize),
            block_tokens=cache.block_tokens,
            token_bytes=self._token_bytes(cache),
            masked=isinstance(mask, torch.Tensor) and mask.dim() == 2 and not bool(mask.all()),
        )

    def _token_bytes(self, cache: ManagedKVCache) -> float:
        text = self._model.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", text.num_attention_heads)
        head_dim = getattr(text, "head_dim", text.hidden_size // text.num_attention_heads)
        layout = cache.codec.layout(heads, cache.block_tokens, head_dim, self._model.dtype)
        return text.num_hidden_layers * sum(segment.n_bytes for segment in layout) / cache.block_tokens

    # --- before each pass ---------------------------------------------------------------------------------------------

    def choose(
        self,
        given: Mapping[str, Any],
        length: int,
        batch: int,
        past: int,
        *,
        whole: bool = False,
        trains: bool = False,
    ) -> int:
        """Reserve memory for a pass, and return how many of its tokens to process at a time.

        Args:
            given: arguments of the forward.
            length: tokens per sequence.
            batch: number of sequences.
            past: cached tokens per sequence.
            whole: the pass cannot be split.
            trains: gradients are needed, so each layer's intermediate results stay in memory.

        Raises:
            MemoryBudgetExceeded: even the smallest piece does not fit.
        """
        if self._whole or (whole and not self._limited):
            return length
        if not self._limited:
            return PIECE_TOKENS
        optimizer, config = self._optimizer, self._model.config
        mask = given.get("attention_mask")
        masked = isinstance(mask, torch.Tensor) and mask.dim() == 2 and not bool(mask.all())
        keep = given.get("logits_to_keep", 0)
        all_logits = not isinstance(keep, int) or keep == 0
        features = max(self._features_of(given), self._features_bytes)
        if self._admitted:
            self._features_bytes = features
        patches = _patches(given)
        vision = vision_bytes(config, patches=patches, itemsize=self._itemsize)
        foreign = self._is_foreign(given)
        cached = self._cache_of(given) is not None

        def peak(piece: int) -> int:
            n = min(piece, length)
            kept = min(keep, n) if not all_logits else n
            rows = batch * kept + (batch * length if all_logits and n < length else 0)
            sizes = {"tokens": batch * n, "itemsize": self._itemsize}
            found = text_bytes(config, logit_rows=rows, cached_tokens=past + length, masked=masked, **sizes)
            if foreign or (not cached and n == length):  # transformers keeps the keys and values
                found += whole_prompt_bytes(config, cached_tokens=batch * past, **sizes)
            if trains:
                layer_bytes = text_bytes(config, logit_rows=0, tokens=batch * n, itemsize=self._itemsize)
                found += self._kept_bytes(layer_bytes, batch * n)
            return max(found, vision) + features

        if length <= FEW_TOKENS and not patches and not trains:
            self._reserve(with_heap(peak(length)))
            return length
        free = optimizer.free_for_activations() - STREAMED_BYTES
        if not foreign:
            free -= self._tail_growth(given, batch, past + length)
        sizes = [] if whole else [size for size in _PIECES if size < length]
        if whole or length <= PIECE_TOKENS:
            sizes = [length, *sizes]
        fitting = next((size for size in sizes if with_heap(peak(size)) <= _PIECE_SHARE * free), None)
        chosen = fitting or sizes[-1]
        self._reserve(with_heap(peak(chosen)))
        return chosen

    def _kept_bytes(self, layer_bytes: int, tokens: int) -> int:
        """Return the bytes that all layers keep for gradients, each about its own peak."""
        text = self._model.config.get_text_config()
        if getattr(self._model, "is_gradient_checkpointing", False) and self._model.training:
            layer_bytes = tokens * int(text.hidden_size) * self._itemsize
        return int(text.num_hidden_layers) * layer_bytes

    def _is_foreign(self, given: Mapping[str, Any]) -> bool:
        cache = self._cache_of(given)
        return cache is not None and not isinstance(cache, ManagedKVCache)

    @staticmethod
    def _cache_of(given: Mapping[str, Any]) -> Any:
        return cache_of(given)

    def _features_of(self, given: Mapping[str, Any]) -> int:
        """Return the bytes of image and video features that exist already or will be computed."""
        encoded = given.get("mm_encoder_outputs") or {}
        found = 0
        for output in encoded.values():
            for part in (getattr(output, "pooler_output", ()), *(getattr(output, "deepstack_features", None) or ())):
                found += sum(each.nbytes for each in ((part,) if isinstance(part, torch.Tensor) else part or ()))
        vision = getattr(self._model.config, "vision_config", None)
        if vision is not None:
            shown = _patches(given) // vision.spatial_merge_size**2
            found += feature_bytes(self._model.config, tokens=shown, itemsize=self._itemsize)
        return found

    def _tail_growth(self, given: Mapping[str, Any], batch: int, total: int) -> int:
        """Return how much the tails of a prompt will still grow, in bytes."""
        text = self._model.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", text.num_attention_heads)
        head_dim = getattr(text, "head_dim", text.hidden_size // text.num_attention_heads)
        cache = self._cache_of(given)
        ours = isinstance(cache, ManagedKVCache)
        tokens = min(total, (cache.block_tokens if ours else BLOCK_TOKENS) + TAIL_TOKENS + FEW_TOKENS)
        itemsize = min(2, self._itemsize) if ours and not cache.codec.lossless else self._itemsize
        return int(batch * tokens * 2 * text.num_hidden_layers * heads * head_dim * itemsize)

    def before_vision(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Reserve memory for the vision tower, as its pre-hook. `generate` calls the tower before the forward."""
        config = self._model.config
        patches = int((args[0] if args else kwargs["hidden_states"]).shape[0])
        shown = patches // config.vision_config.spatial_merge_size**2
        n_bytes = vision_bytes(config, patches=patches, itemsize=self._itemsize)
        n_bytes += feature_bytes(config, tokens=shown, itemsize=self._itemsize)
        held = self._optimizer.pager.ledger.held_bytes("activations")
        self._optimizer.reserve_activations(max(held, with_heap(n_bytes)))

    def _reserve(self, n_bytes: int) -> None:
        # A draft runs between passes of the model: weights would fill the memory it returned, only to be evicted again.
        held = self._optimizer.pager.ledger.held_bytes("activations")
        if self._lowers and n_bytes < held - _WORTH_A_TRIM_BYTES:
            trim_heap()  # return the previous pass's free heap before weights take its place
        n_bytes = n_bytes if self._lowers else max(n_bytes, held)
        try:
            self._optimizer.reserve_activations(n_bytes)
        except MemoryBudgetExceeded as error:
            if not self._admitted:
                raise
            # The estimate of a pass, or the use by others in the control group, grew since: an admitted run continues
            # with what is left.
            logger.warning("a pass needs more memory than is left; trying anyway: %s", str(error))
            self._optimizer.reserve_activations(max(held, min(n_bytes, self._optimizer.free_for_activations())))

    def attach(self) -> None:
        """Register hooks that reserve memory for the vision tower and return free heap to the system."""
        if self._whole:
            return

        def after_layer(module: Any, args: tuple[Any, ...], output: Any) -> None:
            # Freed inputs of blocks fragment the heap between live tensors; without trimming, it grows with each layer.
            if args and args[0].shape[:-1].numel() >= _MANY_TOKENS:
                trim_heap()

        after_layer.changes_nothing = True  # type: ignore[attr-defined]
        for layer in list(getattr(self._model.get_decoder(), "layers", ()))[::_LAYERS_PER_TRIM]:
            layer.register_forward_hook(after_layer)
        vision = vision_tower(self._model)
        if vision is not None and self._limited:
            vision.register_forward_pre_hook(self.before_vision, with_kwargs=True)


def _patches(given: Mapping[str, Any]) -> int:
    return sum(
        int(given[pixels].shape[0]) for pixels, _ in _PIXELS.values() if isinstance(given.get(pixels), torch.Tensor)
    )
