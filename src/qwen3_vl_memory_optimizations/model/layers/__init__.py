"""Forwards of decoder layers and of the vision tower that replace those of transformers, and the memory they take."""
