"""Reuse features of images seen before, including DeepStack features, from the cache.

The key covers the pixels as the model receives them (so the image, its size and its processing), the grid, and the
identity of the model. Each image or video of a call is looked up separately; the missing ones are encoded together, as
without a cache. A hit returns the stored bits.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...cache import CacheItem, HierarchicalCacheSystem, digest, digest_of_tensor
from ..compat import attention_name, base_of, deepstack_levels, picture_features, vision_tower
from ..inputs.names import names_of
from .identity import Identity, ModelIdentity

_KIND = "vision"
_HARMLESS = ("return_dict", "use_cache")
"""Arguments that do not change the features; any other bypasses the cache."""
_MOST_NAMES = 1000
_MORE = ("output_hidden_states", "output_attentions")


def attach_vision_reuse(
    model: Any, cache: HierarchicalCacheSystem, identity: ModelIdentity, reserve: Callable[[int], None]
) -> VisionReuse | None:
    """Make a model look images up before encoding them; return `None` for an unknown model.

    `reserve` is called before a lookup with twice the bytes of the call's features: reading an entry takes as much
    again.

    This replaces the inner model's `get_image_features`, which images and videos of `generate` go through. The tower's
    other outputs (patch states before the merger) are not kept. `forward` and the method itself return them, so images
    are encoded outside `generate` (see `wanted`).
    """
    base = base_of(model)
    plain = getattr(base, "get_image_features", None)
    if plain is None or deepstack_levels(vision_tower(model)) is None:
        return None
    reuse = VisionReuse(base, cache, identity, reserve)
    parameters = list(inspect.signature(plain).parameters)

    @functools.wraps(plain)
    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        pixels, grids = given.pop("pixel_values", None), given.pop("image_grid_thw", None)
        unusual = any(value is not None for name, value in given.items() if name not in _HARMLESS)
        if pixels is None or grids is None or unusual or not reuse.wanted() or _asks_for_more(base, given):
            return plain(*args, **kwargs)
        return reuse.features(plain, pixels, grids, given)

    model.model.get_image_features = get_image_features
    return reuse


def _asks_for_more(base: Any, given: dict[str, Any]) -> bool:
    """Return whether a call, or by default the configuration, asks for a tuple or for outputs that are not kept."""
    as_dict = given.get("return_dict")
    as_dict = getattr(base.config, "return_dict", True) if as_dict is None else as_dict
    return not as_dict or any(
        getattr(config, name, False) for config in (base.config, base.visual.config) for name in _MORE
    )


class VisionReuse:
    """Looks up the images of a call.

    Args:
        base: the inner model, which has the vision tower.
        cache: where features are kept.
        identity: of the model.
        reserve: reserves memory for features.

    Attributes:
        wanted: returns whether features alone are sufficient now.
    """

    def __init__(
        self, base: Any, cache: HierarchicalCacheSystem, identity: ModelIdentity, reserve: Callable[[int], None]
    ) -> None:
        self._base, self._cache, self._identity, self._reserve = base, cache, identity, reserve
        self.wanted: Callable[[], bool] = lambda: True
        self._names: dict[str, str] = {}

    def keys(self, pixels: torch.Tensor, grids: torch.Tensor) -> list[str] | None:
        """Return the key of each image, or `None` if features must not be kept.

        Args:
            pixels: patches of all images `[patches, values]`, in the dtype of the tower or one that is cast to it.
            grids: int64 `[images, 3]`: frame groups, rows and columns of patches.
        """
        identity = self._tower()
        return None if identity is None else self._keys(identity, pixels, grids)

    def note_names(self, keys: Sequence[str], names: Sequence[str]) -> None:
        """Remember the file names of images until their features are computed; other names are forgotten."""
        if len(keys) == len(names):
            if len(self._names) > _MOST_NAMES:
                self._names.clear()
            self._names.update(zip(keys, names, strict=True))

    def _tower(self) -> Identity | None:
        visual = self._base.visual
        return self._identity.of(visual, attention_name(visual.config))

    def _keys(self, identity: Identity, pixels: torch.Tensor, grids: torch.Tensor) -> list[str] | None:
        visual = self._base.visual
        patches = grids.prod(-1).tolist()
        if sum(patches) != pixels.shape[0]:
            return None  # the model reports the mismatch
        parts = pixels.split(patches)
        return [
            digest(_KIND, identity.digest, grid, digest_of_tensor(part, visual.dtype))
            for grid, part in zip(grids.tolist(), parts, strict=True)
        ]

    def features(self, plain: Any, pixels: torch.Tensor, grids: torch.Tensor, options: dict[str, Any]) -> Any:
        """Return what `plain` returns for these images, from the cache where possible."""
        identity = self._tower()
        keys = None if identity is None else self._keys(identity, pixels, grids)
        if identity is None or not keys:
            return plain(pixels, grids, **options)
        self.note_names(keys, names_of(pixels))
        patches = grids.prod(-1).tolist()
        parts = pixels.split(patches)
        visual = self._base.visual
        tokens = sum(patches) // visual.spatial_merge_size**2
        levels = 1 + (deepstack_levels(visual) or 0)
        self._reserve(2 * tokens * visual.config.out_hidden_size * levels * visual.dtype.itemsize)
        encoded: list[Any] = []

        def encode(missing: list[int]) -> list[CacheItem]:
            if len(missing) == len(keys):
                output = plain(pixels, grids, **options)
            else:
                output = plain(torch.cat([parts[index] for index in missing]), grids[missing], **options)
            encoded.append((missing, output))
            return [_item_of(output, position) for position in range(len(missing))]

        items = self._cache.resolve(
            keys,
            encode,
            kind=f"{_KIND} {identity.digest[:8]}",
            units=patches,
            accepts=lambda index, item: self._fits(item, patches[index]),
            persist=identity.persists,
            labels=[self._names.pop(key, "") for key in keys],
        )
        if len(encoded) == 1 and len(encoded[0][0]) == len(keys):
            return encoded[0][1]
        return self._output_of(items)

    def _fits(self, item: CacheItem, patches: int) -> bool:
        visual = self._base.visual
        tokens = patches // visual.spatial_merge_size**2
        names = {"pooled", *(f"deepstack{level}" for level in range(deepstack_levels(visual) or 0))}
        return set(item.tensors) == names and all(
            tensor.shape == (tokens, visual.config.out_hidden_size) and tensor.dtype == visual.dtype
            for tensor in item.tensors.values()
        )

    def _output_of(self, items: Sequence[CacheItem]) -> Any:
        device = self._base.visual.device
        levels = deepstack_levels(self._base.visual) or 0

        def of_all(name: str) -> tuple[torch.Tensor, ...]:
            return tuple(item.tensors[name].to(device) for item in items)

        return picture_features(of_all("pooled"), [of_all(f"deepstack{level}") for level in range(levels)])


def _item_of(output: Any, position: int) -> CacheItem:
    """Return the features of one image of an output."""
    deepstack = {f"deepstack{level}": split[position] for level, split in enumerate(output.deepstack_features)}
    return CacheItem({"pooled": output.pooler_output[position], **deepstack})
