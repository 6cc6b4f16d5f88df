"""Reuse results of the model, and detect whether the model is unchanged."""
