"""How keys and values are cut."""

BLOCK_TOKENS = 256
"""Tokens of a block. In larger ones fewer of the tokens of a conversation lie (its end stays in the tail, in 16 bits,
and a prompt that differs is computed from the last whole block on); smaller ones cost a call of a kernel each."""
TAIL_TOKENS = 64
"""The newest tokens, at least, are never encoded: drafts that are not accepted are taken back without a loss."""
FEW_TOKENS = 16
"""So many new tokens are written to the tail before they are attended to; more are attended to where they are."""
