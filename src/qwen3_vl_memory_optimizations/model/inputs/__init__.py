"""Images, videos and text to the tensors a model takes, within the budget."""
