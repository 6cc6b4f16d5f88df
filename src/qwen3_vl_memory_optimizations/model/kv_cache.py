"""`ManagedKVCache`: keys and values in blocks that are encoded once, behind a tail in the dtype of the computation.

Nothing is concatenated token by token. New tokens are written into the tail of their layer; once a block of them is
complete, and the newest tokens stay behind it, the block is encoded (`compression.kv`) into memory of the Pager, which
counts it and may let it leave for the SSD. Attention (`kv_attention`) runs over the blocks as they are.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from transformers import Cache

from ..compression import KernelSelector, create_kv_codec
from ..paging import Block, BlockSpace, Pager
from .kv_attention import ATTENTION
from .kv_layer import ManagedKVLayer

BLOCK_TOKENS = 512
"""Tokens of a block: at the shape of 2B one is 1 MiB of INT8, a good request to an SSD (1 to 8 MiB)."""
_GROUP_TOKENS = 8192
"""Tokens that are attended to together: more would only make the scores, which are kept meanwhile, larger."""
_UPCOMING_BLOCKS = 32


@lru_cache(maxsize=1)
def _kernels() -> KernelSelector:
    """The kernels chosen so far: for all caches, as they depend on the machine."""
    return KernelSelector()


class ManagedKVCache(Cache):
    """A KV cache in blocks, within the budget of a Pager. `generate` of an optimized model makes one unasked.

    Args:
        config: of the text model, or one that has it.
        codec: of the blocks: `none`, `int8` or `int4`.
        pager: counts the bytes and moves blocks; without one they are plain memory.
        block_tokens: tokens of a block, a multiple of 32; default `BLOCK_TOKENS`.

    Raises:
        ConfigurationError: an unknown codec.
    """

    def __init__(
        self, config: Any, *, codec: str = "none", pager: Pager | None = None, block_tokens: int | None = None
    ) -> None:
        self.config = config.get_text_config(decoder=True)
        self.codec = create_kv_codec(codec, _kernels())
        self.block_tokens = block_tokens or BLOCK_TOKENS
        self.group_blocks = max(1, _GROUP_TOKENS // self.block_tokens)
        self.space = BlockSpace(pager)
        layers = [ManagedKVLayer(self, index) for index in range(self.config.num_hidden_layers)]
        super().__init__(layers=layers)

    @property
    def attends_over_blocks(self) -> bool:
        """Whether the attention in use is that of `kv_attention`."""
        return self.config._attn_implementation == ATTENTION

    def check_room(self, n_tokens: int) -> None:
        """Refuse tokens whose tails do not fit, before the first layer takes them.

        Raises:
            MemoryBudgetExceeded: they do not fit beside what is pinned.
        """
        growth = len(self.layers) * self.layers[0].growth_bytes(n_tokens)
        if growth and self.space.moves:
            self.space.account().add(growth)  # given back at once: each layer takes its own

    def settle(self) -> None:
        """Encode what is complete now, and not with the next token; for who fills a cache without attending."""
        for layer in self.layers:
            layer.settle()

    def upcoming(self, index: int, start: int) -> list[Block]:
        """Return the blocks that are used after block `start` of layer `index`, in order, round the layers."""
        found: list[Block] = []
        order = [*range(index, len(self.layers)), *range(index)]
        for position, layer in enumerate(order):
            blocks = self.layers[layer].blocks
            found += [stored.block for stored in blocks[start if position == 0 else 0 :][:_UPCOMING_BLOCKS]]
            if len(found) >= _UPCOMING_BLOCKS:
                break
        return found[:_UPCOMING_BLOCKS]

    def __deepcopy__(self, memo: dict[int, Any]) -> ManagedKVCache:
        """Return a cache with the same tokens, in memory of its own: for several answers behind one prompt."""
        pager, tokens = self.space.pager, self.block_tokens
        copied = ManagedKVCache(self.config, codec=self.codec.name, pager=pager, block_tokens=tokens)
        for layer, other in zip(copied.layers, self.layers, strict=True):
            layer.copy_of(other)
        return copied

    def storage_bytes(self) -> int:
        """Bytes of all blocks and tails, wherever they are."""
        return sum(layer.storage_bytes() for layer in self.layers)
