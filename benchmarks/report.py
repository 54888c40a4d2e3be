"""Times how a browser opens the report of a run: the page is written once, and opened in a new Chromium each time.

A run over repeated images is made with the demo's model, and `smallcap report` writes its page. The time that is told
begins when the browser is asked for the page. It ends when the first captions are drawn and the page answers.

    python -m benchmarks.report --images 2000
    python -m benchmarks.report --images 2000 --photos FOLDER-OF-PHOTOS

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from benchmarks.job_data import demo_model, repeat_images
from benchmarks.measuring import smallcap
from smallcap.machine.description import describe_machine
from smallcap.model.files import demo_folder

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


def write_page(work: Path, photos: Path, images: int) -> tuple[Path, float]:
    """Captions images and writes the report; returns its file, and how long writing it took, in seconds."""
    model, run, page = demo_model(work), str(work / "run"), work / "report.html"
    inputs = ["--index", model.index, "--model", model.model]
    smallcap("caption", str(repeat_images(photos, work / "images", images)), *inputs, "--out", run)
    return page, smallcap("report", run, "--out", str(page), "--rows", str(images))


def open_page(page: Path) -> dict[str, float]:
    """Opens a page in a new browser; returns the milliseconds until it is loaded, and until it has found a word."""
    program = next(filter(None, map(shutil.which, _PROGRAMS)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        started = time.perf_counter()
        tab.goto(page.as_uri())
        tab.locator("#captions .card .caption").first.wait_for()
        drawn = time.perf_counter()
        tab.get_by_role("searchbox").fill("no caption has this")
        tab.locator("#found").filter(has_text="0 of").wait_for()
        found = time.perf_counter()
        browser.close()
    return {"open_ms": 1000 * (drawn - started), "search_ms": 1000 * (found - drawn)}


def main() -> None:
    """Prints what the page weighs, and the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--photos", type=Path, default=demo_folder() / "images", help="folder of images to repeat")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="smallcap-report-") as work:
        page, write_s = write_page(Path(work), options.photos, options.images)
        megabytes = page.stat().st_size / 1e6
        opened = [open_page(page) for _ in range(options.rounds)]
    found: dict[str, Any] = {name: round(statistics.median(one[name] for one in opened)) for name in opened[0]}
    print(
        f"{options.images:,} images: {megabytes:.1f} MB, written in {write_s:.1f} s, opened in {found['open_ms']} ms, "
        f"searched in {found['search_ms']} ms (medians of {options.rounds})"
    )
    machine = describe_machine(os.cpu_count() or 1)
    print(json.dumps({"machine": machine, "images": options.images, "mb": megabytes, "write_s": write_s, **found}))


if __name__ == "__main__":
    main()
