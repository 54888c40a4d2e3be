"""The forms in which captions are compared."""

from __future__ import annotations

import unicodedata


def normalise(text: str) -> str:
    """Returns a text after NFKC and case folding, the form in which captions and blocklists are compared."""
    return unicodedata.normalize("NFKC", text).casefold()


def fold_caption(text: str) -> str:
    """Returns a caption's normal form with white space collapsed; captions with the same one are the same caption."""
    return " ".join(normalise(text).split())
