"""Reuse the keys and values of a prompt's known beginning.

`generate` receives a cache that begins with the blocks of earlier sequences (`KVStore`), and computes the rest.
Positions are those of the whole prompt, including images and videos; those inside the known beginning are not encoded.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...errors import MemoryBudgetExceeded
from ..compat import CACHE_NAMES, OTHER_DECODING, vision_tower
from ..inputs.names import label_of, names_of
from ..kv.cache import ManagedKVCache
from ..kv.naming import Span, Token, find_spans, named_tokens
from ..kv.store import KVStore
from .identity import Identity, ModelIdentity
from .vision import VisionReuse

logger = logging.getLogger(__name__)

_KIND = "keys and values"
_PICTURES = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
_KNOWN = frozenset(
    {
        "input_ids",
        "inputs",
        "attention_mask",
        "mm_token_type_ids",
        "generation_config",
        "logits_processor",
        "stopping_criteria",
        "prefix_allowed_tokens_fn",
        "streamer",
        "synced_gpus",
        "tokenizer",
        "use_model_defaults",
        *(name for names in _PICTURES.values() for name in names),
    }
)
"""Arguments of `generate` with a known effect on keys and values, besides the decoding settings."""
_FOREIGN = (
    *OTHER_DECODING,
    "inputs_embeds",
    "position_ids",
    "mm_encoder_outputs",
    "assistant_model",
    "negative_prompt_ids",
    "prefill_chunk_size",
    "cache_implementation",
    "output_attentions",
    "output_hidden_states",
    "token_healing",
    "guidance_scale",
    *CACHE_NAMES,
)
"""Arguments of generation modes that bring their own cache or read more than the last token; such calls are left
unchanged.
"""


@dataclass(slots=True)
class Run:
    """One `generate` call whose keys and values are looked up and kept.

    Attributes:
        ids: the prompt; `tokens`: the content of each token.
        spans: its images and videos.
        identity: of the model when the run began.
        cache: empty, or with the known beginning.
        past: length of the known beginning in tokens.
        skipped: by modality, tokens in the known beginning of the image or video that it cuts.
        handed_out: `generate` has received the cache.
        label: what the prompt was made from, if it is known.
    """

    ids: list[int]
    tokens: list[Token]
    spans: list[Span]
    identity: Identity
    cache: ManagedKVCache
    past: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    handed_out: bool = False
    label: str | None = None


class PrefixReuse:
    """Looks prompts up, and keeps their keys and values.

    Args:
        model: a transformers model.
        store: of resting sequences.
        identity: of the model.
        vision: provides keys of images and videos; `None`: prompts with any are computed whole.
        make_cache: returns an empty cache.
    """

    def __init__(
        self,
        model: Any,
        store: KVStore,
        identity: ModelIdentity,
        vision: VisionReuse | None,
        make_cache: Callable[[], ManagedKVCache],
    ) -> None:
        self._model, self._store, self._identity = model, store, identity
        self._vision, self._make_cache = vision, make_cache

    # --- before -------------------------------------------------------------------------------------------------------

    def begin(self, arguments: Mapping[str, Any]) -> Run | None:
        """Return the run of a call with its known beginning, or `None` for a call that is left unchanged."""
        run = self._named(arguments)
        if run is None:
            return None
        match = self._store.find(run.tokens, run.identity.digest, run.cache)
        if match.n_tokens(run.cache.block_tokens):
            try:
                run.past = self._store.adopt(match, run.cache)
            except MemoryBudgetExceeded as error:
                logger.debug("a known beginning is recomputed: %s", str(error))
                run.cache = self._make_cache()
        return run

    def known(self, arguments: Mapping[str, Any]) -> tuple[int, list[list[int]]]:
        """Return how many tokens at the beginning of a prompt are known, and the grids of the pictures behind them.

        Reads no keys and values and counts no lookup.
        """
        run = self._named(arguments)
        if run is None:
            return 0, []
        past = self._store.n_known(run.tokens, run.identity.digest, run.cache.block_tokens)
        behind = [span for span in run.spans if span.stop > past]
        return past, [arguments[_PICTURES[span.modality][1]][span.index].tolist() for span in behind]

    def _named(self, arguments: Mapping[str, Any]) -> Run | None:
        """Return the run of a call with an empty cache, or `None` for a call that is left unchanged."""
        ids = arguments.get("input_ids", arguments.get("inputs"))
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[0] != 1 or ids.is_floating_point():
            return None
        mask = arguments.get("attention_mask")
        if ids.shape[1] < 2 or self._is_foreign(arguments):
            return None
        if mask is not None and (mask.shape != ids.shape or not bool(mask.all())):
            return None
        cache = self._make_cache()
        text = self._model.config.get_text_config()
        if cache.keeps_all:
            return None
        identity = self._identity.of(self._model, _KIND, cache.codec.name, cache.block_tokens)
        if identity is None:
            return None
        listed = ids[0].tolist()
        spans = self._spans(listed, arguments)
        if spans is None:
            return None
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        for layer in cache.layers:
            layer.begin(1, heads, head_dim, self._model.dtype)
        return Run(listed, named_tokens(listed, spans), spans, identity, cache, label=label_of(arguments))

    def _is_foreign(self, arguments: Mapping[str, Any]) -> bool:
        """Return whether a call uses a generation mode that is left unchanged."""

        def setting(name: str) -> Any:
            sources = (arguments.get("generation_config"), self._model.generation_config)
            values = (arguments.get(name), *(getattr(source, name, None) for source in sources))
            return next((value for value in values if value is not None), None)

        settings = vars(type(self._model.generation_config)())
        unknown = (name for name in arguments if name not in _KNOWN and name not in settings)
        if any(arguments[name] is not None for name in unknown):
            return True
        several = any((setting(name) or 1) > 1 for name in ("num_beams", "num_return_sequences"))
        asked = (setting(name) for name in _FOREIGN)  # some are tensors
        return several or setting("use_cache") is False or any(each is not None and each is not False for each in asked)

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
            self._vision.note_names(found or (), names_of(arguments[pixels]))
            if found is None or arguments.get("mm_token_type_ids") is None:
                return None
            grids[modality], keys[modality] = arguments[grid].tolist(), found
        token_ids = {name: getattr(config, f"{name}_token_id", None) for name in _PICTURES}
        known = {name: token_id for name, token_id in token_ids.items() if token_id is not None}
        merge = vision_tower(self._model).spatial_merge_size if grids else 1
        return find_spans(tokens, known, grids, keys, merge)

    def behind(self, run: Run, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments with the whole prompt's positions and only the remaining images and videos."""
        ids: torch.Tensor = arguments["input_ids"] if "input_ids" in arguments else arguments["inputs"]
        shown = {"mm_token_type_ids", *(name for names in _PICTURES.values() for name in names[1:])}
        given = {name: arguments[name] for name in shown if arguments.get(name) is not None}
        given["attention_mask"] = torch.ones_like(ids)
        changed = dict(arguments)
        changed["position_ids"] = self._model._prepare_position_ids_for_generation(ids, given)
        for modality, (pixels, grid) in _PICTURES.items():
            if arguments.get(pixels) is None:
                continue
            mine = [span for span in run.spans if span.modality == modality]
            left = [span for span in mine if span.stop > run.past]
            token_id = getattr(self._model.config, f"{modality}_token_id")
            skipped = sum(
                run.ids[max(span.start, 0) : run.past].count(token_id) for span in left if span.start < run.past
            )
            if skipped:
                run.skipped[modality] = skipped
            if len(left) == len(arguments[grid]):
                continue
            indices = [span.index for span in left]
            parts = arguments[pixels].split(arguments[grid].prod(-1).tolist())
            changed[pixels] = torch.cat([parts[index] for index in indices]) if indices else None
            changed[grid] = arguments[grid][indices] if indices else None
        names = {name for names in _PICTURES.values() for name in names}
        return {name: value for name, value in changed.items() if value is not None or name not in names}

    # --- after --------------------------------------------------------------------------------------------------------

    def keep(self, run: Run, result: Any, seconds_per_token: float) -> None:
        """Store the sequence: the next turn repeats the prompt and the answer."""
        sequence = getattr(result, "sequences", result)[0].tolist()
        n_tokens = min(len(sequence), int(run.cache.get_seq_length()))
        answer = sequence[len(run.ids) : n_tokens]
        pictures = {getattr(self._model.config, f"{name}_token_id", -1) for name in _PICTURES}
        if not n_tokens or n_tokens < run.cache.get_seq_length() or pictures.intersection(answer):
            return
        tokens = [*run.tokens, *answer][:n_tokens]
        now = self._identity.of(self._model, _KIND, run.cache.codec.name, run.cache.block_tokens)
        if now != run.identity:  # the model changed meanwhile
            return
        # The caller may continue with a returned cache, so a copy of it rests.
        cache = run.cache if isinstance(result, torch.Tensor) else copy.deepcopy(run.cache)
        self._store.rest(
            cache,
            0,
            tokens,
            run.identity.digest,
            persist=now.persists,
            saved_s=seconds_per_token,
            label=run.label,
        )
