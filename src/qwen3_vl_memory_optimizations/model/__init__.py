"""Integrate with transformers: skeletons, packing, loading, inputs."""
