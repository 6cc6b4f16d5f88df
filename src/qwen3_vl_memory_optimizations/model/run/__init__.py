"""A run of a model: its turn, its budget, its prompt in pieces, and how long it took."""
