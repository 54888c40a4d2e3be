"""The demo: captions rendered scenes with the model that ships in the repository, then swaps the datastore.

Each step is told before it begins, and its captions are printed as soon as there are any.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from index_builder.build import BuildReport
from jobs import build_index, caption, report
from jobs.screen import say, say_report
from jobs.terminal import console
from jobs.terminal.call_options import ReportOptions
from smallcap import storage
from smallcap.config import CaptionConfig, CleaningConfig, IndexConfig
from smallcap.model.files import DEMO, demo_folder
from smallcap.output.reading import read_captions
from smallcap.output.schema import STATUS_OK

HELD_OUT = "held-out"  # in file names: domains that the model's cross-attention was not trained on
_FIRST_STEP = """\
Step 1 of 3: an index of captions of six domains, among them animals and food, and captions for 48 drawn scenes of these
domains. No training saw the scenes. All three steps take about a minute and a half on two free CPU cores."""
_SAMPLES = """
The captions that fit their images best, and below each the captions that were retrieved as its prompt:
"""
_SECOND_STEP = """
Step 2 of 3: captions for 24 scenes of other domains, among them vehicles and tools, with the same index. The model was
not trained to name these things, and the index has no word for them, so these captions are wrong."""
_THIRD_STEP = """
Step 3 of 3: an index of captions of those other domains, and the same 24 scenes again. Only the datastore is another
one; the model's weights stay as they are."""


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


def run_demo(out: str, address: str | None = None, show: int | None = None) -> DemoResult:
    """Builds the demo's indexes from its caption dumps and captions its images; keeps what is there already.

    Args:
        out: Folder for `index/` and `captions/`, and, for the images of held-out domains, `index-held-out/`,
            `captions-held-out/before/` and `captions-held-out/after/`; and for two pages to look at.
        address: Address of a Ray cluster; by default a local one.
        show: Number of images to print after each step, with what the step is for; by default nothing is printed, and
            no page is written. A quiet command prints only where captions and pages are.
    """
    tell: Callable[[str], None] = _say_nothing if show is None else _say_news
    tell(_FIRST_STEP)
    built = build_demo_index(storage.join(out, "index"), address)
    summary = _caption("images", built.index_uri, storage.join(out, "captions"), address)
    if show:
        tell(_SAMPLES)
        console.print_samples(summary.out, show)
    tell(_SECOND_STEP)
    before = _caption_held_out("before", built.index_uri, out, address)
    tell(_THIRD_STEP)
    other = build_demo_index(storage.join(out, f"index-{HELD_OUT}"), address, f"captions-{HELD_OUT}.csv")
    swap = SwapResult(before, _caption_held_out("after", other.index_uri, out, address))
    if show:
        tell("")
        console.print_swap(compare_swap(swap)[:show])
    if show is not None:
        say_report(f"\nParquet: {summary.out}, {swap.before.out} and {swap.after.out}", slice(1, None))
    if show:
        tell("Pages with the pictures, for a browser:")
        say(report.run(ReportOptions(path=summary.out, out=storage.join(out, "captions.html"))))
        swapped = ReportOptions(path=swap.before.out, other=swap.after.out, out=storage.join(out, "swap.html"))
        say(report.run(swapped))
    return DemoResult(built.index_uri, not built.no_op, summary, swap)


def build_demo_index(out: str, address: str | None = None, dump: str = "captions.csv") -> BuildReport:
    """Builds the index of one of the demo's caption dumps at `out`, unless it is there."""
    dumps = (str(demo_folder() / dump),)
    cleaning = CleaningConfig(tokenizer=DEMO)
    return build_index.run(IndexConfig(dumps=dumps, out=out, encoder=DEMO, shards=2, cleaning=cleaning), address)


def _say_nothing(text: str) -> None:
    """Stands for `_say_news` where the demo runs as a function."""


def _say_news(text: str) -> None:
    say_report(text, slice(0))


def _caption(images: str, index: str, out: str, address: str | None) -> caption.RunSummary:
    config = CaptionConfig(images=(str(demo_folder() / images),), index=index, model=DEMO, out=out)
    return caption.run(config, address)


def _caption_held_out(name: str, index: str, out: str, address: str | None) -> caption.RunSummary:
    return _caption(f"images-{HELD_OUT}", index, storage.join(out, f"captions-{HELD_OUT}", name), address)


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
