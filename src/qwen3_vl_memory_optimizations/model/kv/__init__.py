"""Keys and values: blocks, sequences, the store of those that rest, and the attention over them."""
