"""The demo: the whole path on rendered scenes, with the model that ships in the repository, and another datastore."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass

from index_builder.build import BuildReport
from jobs import build_index, caption
from jobs.captioning.record import read_parts
from smallcap import storage
from smallcap.config import CaptionConfig, CleaningConfig, IndexConfig
from smallcap.model.files import DEMO, demo_folder
from smallcap.output.schema import STATUS_OK

HELD_OUT = "held-out"  # domains that the model's cross-attention was not trained on, as the files are named


@dataclass(frozen=True)
class SwapResult:
    """Images of held-out domains, captioned with the datastore of the training domains and with their own."""

    before: caption.RunSummary
    after: caption.RunSummary


@dataclass(frozen=True)
class DemoResult:
    """Where the demo's index and captions are, and what was computed for them."""

    index: str
    index_was_built: bool
    summary: caption.RunSummary
    swap: SwapResult


def run_demo(out: str, address: str | None = None) -> DemoResult:
    """Builds the demo's indexes from its caption dumps and captions its images; what is there already is kept.

    Args:
        out: Folder for `index/` and `captions/`, and, for the images of held-out domains, `index-held-out/` and
            `captions-held-out/before/` and `after/`.
        address: Of a Ray cluster; by default a local one.
    """
    report = build_demo_index(storage.join(out, "index"), address)
    summary = _caption("images", report.index_uri, storage.join(out, "captions"), address)
    own = build_demo_index(storage.join(out, f"index-{HELD_OUT}"), address, f"captions-{HELD_OUT}.csv").index_uri
    swapped = {
        name: _caption(f"images-{HELD_OUT}", index, storage.join(out, f"captions-{HELD_OUT}", name), address)
        for name, index in (("before", report.index_uri), ("after", own))
    }
    return DemoResult(report.index_uri, not report.no_op, summary, SwapResult(**swapped))


def build_demo_index(out: str, address: str | None = None, dump: str = "captions.csv") -> BuildReport:
    """Builds the index of a caption dump of the demo at `out`, unless it is there."""
    dumps = (str(demo_folder() / dump),)
    cleaning = CleaningConfig(tokenizer=DEMO)
    return build_index.run(IndexConfig(dumps=dumps, out=out, encoder=DEMO, shards=2, cleaning=cleaning), address)


def _caption(images: str, index: str, out: str, address: str | None) -> caption.RunSummary:
    config = CaptionConfig(images=(str(demo_folder() / images),), index=index, model=DEMO, out=out)
    return caption.run(config, address)


def compare_swap(swap: SwapResult) -> list[dict[str, str]]:
    """Returns for each image its caption before and after the swap, and what a person would write."""
    references = json.loads((demo_folder() / f"references-{HELD_OUT}.json").read_bytes())
    names = {image["id"]: image["file_name"] for image in references["images"]}
    rows: dict[str, dict[str, str]] = defaultdict(dict)
    for column, run in (("before", swap.before), ("after", swap.after)):
        for _, part in read_parts(run.out, ["image_id", "caption", "status"]):
            for row in part.to_pylist():
                rows[row["image_id"]][column] = row["caption"] if row["status"] == STATUS_OK else "(no caption)"
    for annotation in reversed(references["annotations"]):
        rows[names[annotation["image_id"]]]["reference"] = annotation["caption"]  # the first of each image stays
    return [{"image": name, **values} for name, values in sorted(rows.items())]
