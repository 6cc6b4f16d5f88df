"""Convert images, videos and text into the tensors of a model, within the budget."""
