"""SmallCap: retrieval-augmented image captioning for millions of images.

    captioner = smallcap.Captioner.from_pretrained("demo", index="out/demo/index")
    results = captioner.caption([open("photo.jpg", "rb").read()])

The library runs without Ray; `jobs/` runs it on a cluster. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smallcap.captioner import Captioner, CaptionResult
    from smallcap.checkpoint import SmallCapModel, load_checkpoint, save_checkpoint
    from smallcap.clip_encoder import load_retrieval_encoder
    from smallcap.retriever import Neighbour, Retriever

__version__ = "0.1.0"

_HOMES = {
    "CaptionResult": "smallcap.captioner",
    "Captioner": "smallcap.captioner",
    "Neighbour": "smallcap.retriever",
    "Retriever": "smallcap.retriever",
    "SmallCapModel": "smallcap.checkpoint",
    "load_checkpoint": "smallcap.checkpoint",
    "load_retrieval_encoder": "smallcap.clip_encoder",
    "save_checkpoint": "smallcap.checkpoint",
}

__all__ = [
    "CaptionResult",
    "Captioner",
    "Neighbour",
    "Retriever",
    "SmallCapModel",
    "__version__",
    "load_checkpoint",
    "load_retrieval_encoder",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'smallcap' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
