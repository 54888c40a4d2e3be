"""The demo: the whole path on rendered scenes, with the model that ships in the repository."""

from __future__ import annotations

from dataclasses import dataclass

from jobs import build_index, caption
from smallcap import storage
from smallcap.config import CaptionConfig, CleaningConfig, IndexConfig
from smallcap.model_files import DEMO, demo_folder


@dataclass(frozen=True)
class DemoResult:
    """Where the demo's index and captions are, and what was computed for them."""

    index: str
    index_was_built: bool
    summary: caption.RunSummary


def run_demo(out: str, address: str | None = None) -> DemoResult:
    """Builds the demo's index from its caption dump and captions its images; what is there already is kept.

    Args:
        out: Folder for `index/` and `captions/`.
        address: Of a Ray cluster; by default a local one.
    """
    folder = demo_folder()
    index, captions = storage.join(out, "index"), storage.join(out, "captions")
    report = build_index.run(
        IndexConfig(
            dumps=(str(folder / "captions.csv"),),
            out=index,
            encoder=DEMO,
            shards=2,
            cleaning=CleaningConfig(tokenizer=DEMO),
        ),
        address,
    )
    summary = caption.run(
        CaptionConfig(images=(str(folder / "images"),), index=index, model=DEMO, out=captions), address
    )
    return DemoResult(index, not report.no_op, summary)
