"""Manage keys and values: blocks, sequences, the store of resting sequences, and attention over blocks."""
