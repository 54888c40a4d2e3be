"""The demo: captions rendered scenes with the model that ships in the repository, then swaps the datastore."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass

from index_builder.build import BuildReport
from jobs import build_index, caption
from smallcap import storage
from smallcap.config import CaptionConfig, CleaningConfig, IndexConfig
from smallcap.model.files import DEMO, demo_folder
from smallcap.output.reading import read_captions
from smallcap.output.schema import STATUS_OK

HELD_OUT = "held-out"  # in file names: domains that the model's cross-attention was not trained on


@dataclass(frozen=True)
class SwapResult:
    """Images of held-out domains, captioned with the training domains' datastore and with their own."""

    before: caption.RunSummary
    after: caption.RunSummary


@dataclass(frozen=True)
class DemoResult:
    """Where the demo's index and captions are, and what this call computed."""

    index: str
    index_was_built: bool
    summary: caption.RunSummary
    swap: SwapResult


def run_demo(out: str, address: str | None = None) -> DemoResult:
    """Builds the demo's indexes from its caption dumps and captions its images; keeps what is there already.

    Args:
        out: Folder for `index/` and `captions/`, and, for the images of held-out domains, `index-held-out/`,
            `captions-held-out/before/` and `captions-held-out/after/`.
        address: Address of a Ray cluster; by default a local one.
    """
    report = build_demo_index(storage.join(out, "index"), address)
    summary = _caption("images", report.index_uri, storage.join(out, "captions"), address)
    other = build_demo_index(storage.join(out, f"index-{HELD_OUT}"), address, f"captions-{HELD_OUT}.csv")
    swapped = {
        name: _caption(f"images-{HELD_OUT}", index, storage.join(out, f"captions-{HELD_OUT}", name), address)
        for name, index in (("before", report.index_uri), ("after", other.index_uri))
    }
    return DemoResult(report.index_uri, not report.no_op, summary, SwapResult(**swapped))


def build_demo_index(out: str, address: str | None = None, dump: str = "captions.csv") -> BuildReport:
    """Builds the index of one of the demo's caption dumps at `out`, unless it is there."""
    dumps = (str(demo_folder() / dump),)
    cleaning = CleaningConfig(tokenizer=DEMO)
    return build_index.run(IndexConfig(dumps=dumps, out=out, encoder=DEMO, shards=2, cleaning=cleaning), address)


def _caption(images: str, index: str, out: str, address: str | None) -> caption.RunSummary:
    config = CaptionConfig(images=(str(demo_folder() / images),), index=index, model=DEMO, out=out)
    return caption.run(config, address)


def compare_swap(swap: SwapResult) -> list[dict[str, str]]:
    """Returns for each image its captions before and after the swap, and a reference caption."""
    references = json.loads((demo_folder() / f"references-{HELD_OUT}.json").read_bytes())
    names = {image["id"]: image["file_name"] for image in references["images"]}
    rows: dict[str, dict[str, str]] = defaultdict(dict)
    for column, run in (("before", swap.before), ("after", swap.after)):
        for row in read_captions(run.out, ["image_id", "caption", "status"]).rows():
            rows[row["image_id"]][column] = row["caption"] if row["status"] == STATUS_OK else "(no caption)"
    for annotation in reversed(references["annotations"]):
        rows[names[annotation["image_id"]]]["reference"] = annotation["caption"]  # each image's first one stays
    return [{"image": name, **values} for name, values in sorted(rows.items())]
