"""SmallCap: retrieval-augmented image captioning for millions of images.

    captioner = smallcap.Captioner.from_pretrained("demo", index="out/demo/index")
    results = captioner.caption([open("photo.jpg", "rb").read()])

The library runs without Ray; `jobs/` runs it on a cluster. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smallcap.captioned import CaptionResult
    from smallcap.captioner import Captioner, CaptionerOptions
    from smallcap.index.retriever import Neighbour, Retriever
    from smallcap.model.checkpoint import SmallCapModel, load_checkpoint, save_checkpoint
    from smallcap.model.clip_encoder import load_retrieval_encoder

__version__ = "0.1.0"

_HOMES = {
    "CaptionResult": "smallcap.captioned",
    "Captioner": "smallcap.captioner",
    "CaptionerOptions": "smallcap.captioner",
    "Neighbour": "smallcap.index.retriever",
    "Retriever": "smallcap.index.retriever",
    "SmallCapModel": "smallcap.model.checkpoint",
    "load_checkpoint": "smallcap.model.checkpoint",
    "load_retrieval_encoder": "smallcap.model.clip_encoder",
    "save_checkpoint": "smallcap.model.checkpoint",
}

__all__ = [
    "CaptionResult",
    "Captioner",
    "CaptionerOptions",
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
