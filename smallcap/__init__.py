"""SmallCap: retrieval-augmented image captioning for millions of images.

    captioner = smallcap.Captioner.from_pretrained("demo", index="out/demo/index")
    results = captioner.caption(["photo.jpg", "https://example.org/photo.jpg"])
    rows = smallcap.read_captions("out/demo/captions").to_pandas()

The library runs without Ray; `jobs/` runs it on a cluster. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smallcap.captioned import CaptionResult, ScoredCaption
    from smallcap.captioner import Captioner
    from smallcap.captioner_setup import CaptionerOptions
    from smallcap.errors import ErrorCode, RowError, RunError, SmallCapError
    from smallcap.generation_config import GenerationConfig
    from smallcap.index.retriever import Neighbour, Retriever
    from smallcap.model.checkpoint import SmallCapModel, load_checkpoint, save_checkpoint
    from smallcap.model.clip_encoder import load_retrieval_encoder
    from smallcap.output.reading import Captions, read_captions

__version__ = "0.1.0"

_HOMES = {
    "CaptionResult": "smallcap.captioned",
    "Captioner": "smallcap.captioner",
    "CaptionerOptions": "smallcap.captioner_setup",
    "Captions": "smallcap.output.reading",
    "ErrorCode": "smallcap.errors",
    "GenerationConfig": "smallcap.generation_config",
    "Neighbour": "smallcap.index.retriever",
    "Retriever": "smallcap.index.retriever",
    "RowError": "smallcap.errors",
    "RunError": "smallcap.errors",
    "ScoredCaption": "smallcap.captioned",
    "SmallCapError": "smallcap.errors",
    "SmallCapModel": "smallcap.model.checkpoint",
    "load_checkpoint": "smallcap.model.checkpoint",
    "load_retrieval_encoder": "smallcap.model.clip_encoder",
    "read_captions": "smallcap.output.reading",
    "save_checkpoint": "smallcap.model.checkpoint",
}

__all__ = [
    "CaptionResult",
    "Captioner",
    "CaptionerOptions",
    "Captions",
    "ErrorCode",
    "GenerationConfig",
    "Neighbour",
    "Retriever",
    "RowError",
    "RunError",
    "ScoredCaption",
    "SmallCapError",
    "SmallCapModel",
    "__version__",
    "load_checkpoint",
    "load_retrieval_encoder",
    "read_captions",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'smallcap' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
