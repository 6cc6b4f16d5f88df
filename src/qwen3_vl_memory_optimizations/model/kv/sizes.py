"""Sizes of the blocks and the tail of keys and values."""

BLOCK_TOKENS = 256
"""Tokens per block. Larger blocks cover less of a conversation: its end stays in the 16-bit tail, and a prompt that
diverges is recomputed from the last whole block. Each smaller block costs another kernel call.
"""
TAIL_TOKENS = 64
"""At least this many of the newest tokens are never encoded, so rejected speculated tokens are rolled back without
loss.
"""
FEW_TOKENS = 16
"""Up to this many new tokens are written to the tail before attention; more are attended to where they were computed.
"""
