"""Figures of captioning runs against reference captions, with confidence intervals."""
