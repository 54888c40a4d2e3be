"""The training job's stages, its record and its loop."""
