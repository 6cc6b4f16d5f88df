"""Run a prompt in pieces, so that transient memory grows with the piece, not with the prompt.

The replaced forward runs a long prompt piece by piece on the same cache and computes only the requested logits. Images
and videos are encoded once; each piece gets the features of its own tokens. Weights outside memory are read once per
piece.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from ...interrupts import deferrable
from ..compat import base_of, cache_name, cache_of, picture_features

PIECE_TOKENS = 1024
"""The largest piece. Products of 1,024 rows are as fast as larger ones and take longer than reading all weights."""
_PICTURES = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
_PIXELS = tuple(pixels for pixels, _ in _PICTURES.values())
_WHOLE = ("labels", "output_attentions", "output_hidden_states", "token_type_ids")
"""Arguments that need all tokens at once."""


def forward_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the sequences, new tokens and cached tokens per sequence of a forward; (1, 1, 0) if unknown."""
    tokens = kwargs.get("input_ids", args[0] if args else None)
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    batch, length = tokens.shape[:2] if isinstance(tokens, torch.Tensor) and tokens.dim() >= 2 else (1, 1)
    cache = cache_of(kwargs)
    return int(batch), int(length), int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


class PieceRunner:
    """The forward of a model, which runs a prompt longer than one piece in pieces.

    Args:
        model: a transformers model.
        make_cache: returns an empty cache for a call without one; `None`: the prompt runs whole.
        choose: reserves memory and returns the tokens per piece. Takes the arguments of a forward, its tokens per
            sequence, the number of sequences, the cached tokens per sequence, whether the forward must run whole, and
            whether gradients are needed.
        turn: held during the forward.

    Attributes:
        skipped: image and video tokens before the start of the next forward, by modality; their features come first
            among those passed to it.
    """

    def __init__(
        self,
        model: Any,
        make_cache: Callable[[], Any] | None,
        choose: Callable[..., int],
        turn: AbstractContextManager[Any],
    ) -> None:
        self._model = model
        self._base: Any = base_of(model)
        self._make_cache, self._choose, self._turn = make_cache, choose, turn
        self._plain = model.forward
        self._signature = inspect.signature(self._plain)
        parameters = self._signature.parameters
        self._cache_name = cache_name(parameters)
        self.skipped: dict[str, int] = {}

    def attach(self) -> None:
        """Replace the forward of the model."""
        plain = self._plain

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            with deferrable(), self._turn:
                return self._run(args, kwargs)

        self._model.forward = forward

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        given = {**bound, **bound.get("kwargs", {})}
        given.pop("kwargs", None)
        batch, length, past = forward_size((), given)
        trains = self._trains(given)
        whole = trains or not self._can_cut(given)
        piece = self._choose(given, length, batch, past, whole=whole, trains=trains)
        skipped, self.skipped = self.skipped, {}
        if whole or (length <= piece and not skipped):
            return self._plain(*args, **kwargs)
        return self._in_pieces(given, length, min(piece, length), past, skipped)

    def _trains(self, given: Mapping[str, Any]) -> bool:
        """Return whether gradients are needed, which keep data of all tokens alive."""
        if not torch.is_grad_enabled():
            return False
        inputs = (value for value in given.values() if isinstance(value, torch.Tensor))
        return any(value.requires_grad for value in (*inputs, *self._model.parameters()))

    def _can_cut(self, given: Mapping[str, Any]) -> bool:
        mask = given.get("attention_mask")
        pictures = bool(given.get("mm_encoder_outputs")) or any(given.get(name) is not None for name in _PIXELS)
        config = self._model.config
        asked = (getattr(config, "output_attentions", False), getattr(config, "output_hidden_states", False))
        return (
            self._make_cache is not None
            and not any(asked)
            and not (pictures and given.get("mm_token_type_ids") is None)  # transformers reports what is missing
            and all(given.get(name) is None or given[name] is False for name in _WHOLE)
            and isinstance(given.get("logits_to_keep", 0), int)
            and (mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2))
        )

    def _in_pieces(self, given: dict[str, Any], length: int, piece: int, past: int, skipped: Mapping[str, int]) -> Any:
        arguments = dict(given)
        keeps = arguments.get("use_cache") is not False
        if arguments.get(self._cache_name) is None and self._make_cache is not None:
            arguments[self._cache_name] = self._make_cache()
        as_tuple = arguments.pop("return_dict", None)
        as_tuple = not getattr(self._model.config, "return_dict", True) if as_tuple is None else not as_tuple
        arguments["use_cache"] = True
        encoded = self._encoded(arguments)
        positions = self._positions(arguments, length, past)
        wanted = arguments.pop("logits_to_keep", 0) or length
        mask, types = arguments.pop("attention_mask", None), arguments.pop("mm_token_type_ids", None)
        for name in ("position_ids", "cache_position"):
            arguments.pop(name, None)
        names = [name for name in ("input_ids", "inputs_embeds") if arguments.get(name) is not None]
        whole = {name: arguments.pop(name) for name in names}
        rows = None if types is None else self._rows(types, skipped)
        logits, result = [], None
        for start in range(0, length, piece):
            stop = min(start + piece, length)
            part = {name: values[:, start:stop] for name, values in whole.items()}
            if positions is not None:
                part["position_ids"] = positions[..., start:stop]
            if mask is not None:
                part["attention_mask"] = mask[:, : mask.shape[1] - length + stop]
            if encoded:
                assert rows is not None
                features = self._features(encoded, rows, start, stop)
                if features:
                    part["mm_encoder_outputs"] = features
            keep = min(stop - start, wanted - (length - stop))
            if keep > 0:
                result = self._plain(**arguments, **part, logits_to_keep=keep, return_dict=True)
                logits.append(result.logits)
            else:
                self._base(**arguments, **part)
        assert result is not None
        if len(logits) > 1:
            result.logits = torch.cat(logits, dim=1)
        for modality, output in encoded.items():
            if hasattr(result, f"{modality}_outputs"):  # otherwise it covers only the last piece
                result[f"{modality}_outputs"] = output
        if not keeps:
            result[self._cache_name] = None
        return result.to_tuple() if as_tuple else result

    # --- images and videos --------------------------------------------------------------------------------------------

    def _encoded(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Remove images and videos from the arguments and return their features by modality."""
        found = {name: value for name, value in (arguments.pop("mm_encoder_outputs", None) or {}).items() if value}
        for modality, (pixels_name, grid_name) in _PICTURES.items():
            pixels, grid = arguments.pop(pixels_name, None), arguments.get(grid_name)
            if pixels is not None and modality not in found:
                encode = getattr(self._base, f"get_{modality}_features")
                found[modality] = encode(pixels, grid, return_dict=True)
        return found

    def _positions(self, arguments: dict[str, Any], length: int, past: int) -> torch.Tensor | None:
        """Return the positions of all tokens, `[.., batch, length]`, and remove the grids from the arguments."""
        grids = {name: arguments.pop(name, None) for _, name in _PICTURES.values()}
        positions = arguments.get("position_ids")
        if positions is not None:
            return positions
        compute = getattr(self._base, "compute_3d_position_ids", None)
        tokens = arguments.get("input_ids")
        if compute is not None:
            embeds = arguments.get("inputs_embeds")
            if embeds is None and tokens is not None:
                embeds = tokens[..., None]  # only its shape matters
            positions = compute(
                input_ids=tokens,
                inputs_embeds=embeds,
                attention_mask=arguments.get("attention_mask"),
                mm_token_type_ids=arguments.get("mm_token_type_ids"),
                **{self._cache_name: arguments.get(self._cache_name)},
                **{name: grid for name, grid in grids.items() if grid is not None},
            )
            if positions is not None:
                return positions[..., -length:]
        return (
            None
            if compute is None
            else torch.arange(past, past + length)
            .view(1, 1, -1)
            .expand(4, (tokens if tokens is not None else arguments["inputs_embeds"]).shape[0], -1)
        )

    def _rows(self, types: torch.Tensor, skipped: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """Return, by modality, the feature index of each token, counted over the batch; -1: none."""
        found = {}
        for modality, number in (("image", 1), ("video", 2)):
            seen = types == number
            order = seen.reshape(-1).cumsum(0).view(seen.shape) - 1 + skipped.get(modality, 0)
            found[modality] = torch.where(seen, order, torch.full_like(order, -1))
        return found

    @staticmethod
    def _features(
        encoded: Mapping[str, Any], rows: Mapping[str, torch.Tensor], start: int, stop: int
    ) -> dict[str, Any]:
        found = {}
        for modality, output in encoded.items():
            part = rows[modality][:, start:stop]
            wanted = part[part >= 0]
            if len(wanted):
                found[modality] = picture_features(
                    (_picked(output.pooler_output, wanted),),
                    [(_picked(level, wanted),) for level in output.deepstack_features],
                )
        return found


def _picked(parts: Any, rows: torch.Tensor) -> torch.Tensor:
    """Return selected rows, in ascending order, of consecutive tensors, without copying the others."""
    parts = (parts,) if isinstance(parts, torch.Tensor) else parts
    found, start = [], 0
    for part in parts:
        inside = rows[(rows >= start) & (rows < start + len(part))] - start
        if len(inside):
            first, last = int(inside[0]), int(inside[-1])
            found.append(part[first : last + 1] if last - first + 1 == len(inside) else part[inside])
        start += len(part)
    return torch.cat(found) if len(found) != 1 else found[0]
