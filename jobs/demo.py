"""The demo: the whole path on rendered scenes, with the model that ships in the repository."""

from __future__ import annotations

from dataclasses import dataclass

from index_builder.build import BuildReport
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
    report = build_demo_index(storage.join(out, "index"), address)
    images, captions = str(demo_folder() / "images"), storage.join(out, "captions")
    config = CaptionConfig(images=(images,), index=report.index_uri, model=DEMO, out=captions)
    return DemoResult(report.index_uri, not report.no_op, caption.run(config, address))


def build_demo_index(out: str, address: str | None = None) -> BuildReport:
    """Builds the index of the demo's caption dump at `out`, unless it is there."""
    dump = str(demo_folder() / "captions.csv")
    cleaning = CleaningConfig(tokenizer=DEMO)
    return build_index.run(IndexConfig(dumps=(dump,), out=out, encoder=DEMO, shards=2, cleaning=cleaning), address)
