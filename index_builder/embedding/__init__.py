"""Embeddings of captions and of calibration images."""
