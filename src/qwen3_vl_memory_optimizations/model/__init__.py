"""The integration with transformers: skeletons, packing, loading, inputs."""
