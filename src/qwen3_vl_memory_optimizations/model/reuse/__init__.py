"""Results that are used again, and what tells that the model is still the same."""
