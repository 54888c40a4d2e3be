"""The captioning job's stages, its plan, its record and its display."""
