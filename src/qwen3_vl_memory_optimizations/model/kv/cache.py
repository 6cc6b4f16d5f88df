"""Keep keys and values in blocks that are encoded once, followed by a 16-bit tail (`ManagedKVCache`).

Nothing is concatenated per token. New tokens are written to the tail of their layer. Once a block is complete and
enough newer tokens follow it, it is encoded (`compression.kv`) into memory of the Pager, which counts it and may move
it to the SSD. Attention (`attention.py`) runs on the encoded blocks.
"""

from __future__ import annotations

from typing import Any

from transformers import Cache, DynamicCache

from ...compression import create_kv_codec
from ...paging import Block, BlockSpace, Pager
from ..compat import attention_name
from .attention import ATTENTION
from .layer import ManagedKVLayer
from .sizes import BLOCK_TOKENS

_GROUP_TOKENS = 8192
"""Tokens per attention group: a larger group would only enlarge its scores, which stay in memory meanwhile."""
_UPCOMING_BLOCKS = 64


class ManagedKVCache(DynamicCache):
    """A KV cache in blocks, within the budget of a Pager. `generate` of an optimized model creates one by default.

    It replaces the `DynamicCache` of transformers and grows the same way, but shares none of its implementation.

    Args:
        config: of the text model, or one that contains it.
        codec: encodes the blocks: `none`, `int8` or `int4`.
        pager: counts the bytes and moves blocks; without one they are plain memory.
        block_tokens: tokens per block, a multiple of 32; default `BLOCK_TOKENS`.
        keeps_all: keep all tokens in one place, with attention bit-identical to transformers; default: where blocks
            would save nothing (codec `none` and no budget).

    Raises:
        ConfigurationError: the codec is unknown.
    """

    def __init__(
        self,
        config: Any,
        *,
        codec: str = "none",
        pager: Pager | None = None,
        block_tokens: int | None = None,
        keeps_all: bool | None = None,
    ) -> None:
        self.config = config.get_text_config(decoder=True)
        self.codec = create_kv_codec(codec)
        self.block_tokens = block_tokens or BLOCK_TOKENS
        self.group_blocks = max(1, _GROUP_TOKENS // self.block_tokens)
        self.space = BlockSpace(pager)
        self.keeps_all = self.codec.lossless and not self.space.moves if keeps_all is None else keeps_all
        layers = [ManagedKVLayer(self, index) for index in range(self.config.num_hidden_layers)]
        Cache.__init__(self, layers=layers)

    @property
    def attends_over_blocks(self) -> bool:
        """Whether the active attention is that of `attention.py`."""
        return attention_name(self.config) == ATTENTION

    def require_room(self, n_tokens: int) -> None:
        """Reject tokens whose tails do not fit, before the first layer takes them.

        Raises:
            MemoryBudgetExceeded: they do not fit beside the non-evictable memory.
        """
        growth = len(self.layers) * self.layers[0].growth_bytes(n_tokens)
        if growth:
            self.space.require_room(growth)

    def upcoming(self, index: int, row: int, start: int) -> list[Block]:
        """Return the blocks used after block `start` of a row of layer `index`, in order, wrapping around layers."""
        found: list[Block] = []
        first: ManagedKVLayer = self.layers[index]
        found += [stored.block for stored in first.rows[row][start : start + _UPCOMING_BLOCKS]]
        for later in range(row + 1, len(first.rows)):
            found += [stored.block for stored in first.rows[later][:_UPCOMING_BLOCKS]]
        for layer in (*range(index + 1, len(self.layers)), *range(index)):
            if len(found) >= _UPCOMING_BLOCKS:
                break
            found += [stored.block for each in self.layers[layer].rows for stored in each[:_UPCOMING_BLOCKS]]
        return found[:_UPCOMING_BLOCKS]

    def __deepcopy__(self, memo: dict[int, Any]) -> ManagedKVCache:
        """Return a cache with the same tokens, for several answers to one prompt; blocks are shared."""
        copied = ManagedKVCache(
            self.config,
            codec=self.codec.name,
            pager=self.space.pager,
            block_tokens=self.block_tokens,
            keeps_all=self.keeps_all,
        )
        for layer, other in zip(copied.layers, self.layers, strict=True):
            layer.copy_of(other)
        return copied

    def storage_bytes(self) -> int:
        """Return the bytes of all blocks and tails, in memory or on the SSD."""
        return sum(layer.storage_bytes() for layer in self.layers)
