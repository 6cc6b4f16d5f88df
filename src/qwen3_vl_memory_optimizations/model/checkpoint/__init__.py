"""Turn checkpoints into managed weights: read formats, pack, load and save."""
