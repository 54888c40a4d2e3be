"""The captioning job's stages, plan, record and display."""
