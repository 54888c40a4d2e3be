"""The training job's stages, record and loop."""
