"""The report's page in a browser: search, filters, order, keys, two runs, phones, dark mode; its console is empty.

Skipped where there is no playwright, or no Chromium.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from jobs import report
from jobs.terminal.call_options import ReportOptions
from tests.index_files import PublishIndex, unit_vectors
from tests.report_runs import caption_row, error_row, write_photos, write_run

pytest.importorskip("playwright", reason="`make setup` installs playwright, which drives the browser")

from playwright.sync_api import Error, sync_playwright

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytestmark = pytest.mark.slow

MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)>"
IMAGES = 150  # more than are drawn at once
_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, _PROGRAMS)), None)
    with sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=program)
        except Error as error:
            pytest.skip(f"no Chromium can be started: {str(error).splitlines()[0]}")
        yield started
        started.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two runs over the same images, the second with some other captions."""
    folder = tmp_path_factory.mktemp("runs")
    uris = write_photos(folder / "photos", IMAGES)
    first = [
        caption_row(f"{n:04d}.jpg", f"a dog on road{n}", uri, n / 200, ["a dog on road", f"a bus{n}"])
        for n, uri in enumerate(uris)
    ]
    first[7] = caption_row(f"{MARKUP}.jpg", MARKUP, uris[7], 0.9, [MARKUP])
    first[8]["image_uri"] = str(folder / "gone.jpg")
    first[9]["caption"] = "  "
    first += [error_row(f"e{n}.jpg", code, MARKUP) for n, code in enumerate(["timeout"] * 3 + ["empty"] * 2)]
    second = [dict(row) for row in first]
    for number in (20, 40):
        second[number]["caption"] = f"a cat on road{number}"
    return [write_run(str(folder / name), rows) for name, rows in (("first", first), ("second", second))]


Opened = Callable[..., "Page"]


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Iterator[Opened]:
    """A function that writes a report and opens it; what the page says on its console fails the test."""
    said: list[str] = []
    asked: list[str] = []

    def opened(*paths: str, **options: Any) -> Page:
        path, other = (*paths, None)[:2]
        assert path is not None
        report.run(ReportOptions(path=path, other=other, out=str(tmp_path / "report.html")))
        page = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options}).new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(f"dialog {dialog.message}"))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((tmp_path / "report.html").as_uri())
        return page

    yield opened
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert sum(url.startswith("file:") for url in asked) == 1
    for context in browser.contexts:
        context.close()


def captions(page: Page) -> list[str]:
    return page.locator("#captions .card .caption").all_inner_texts()


def found(page: Page) -> str:
    return page.locator("#found").inner_text()


def filter_named(page: Page, name: str) -> Locator:
    return page.get_by_role("group", name="Filters").get_by_role("button", name=name)


def test_what_is_typed_is_searched_in_captions_neighbours_and_names(runs: list[str], opened: Opened) -> None:
    page = opened(runs[0])
    assert found(page) == "155 images."
    search = page.get_by_role("searchbox")
    search.fill("DOG road33")
    assert captions(page) == ["a dog on road33"]
    assert found(page) == "1 of 155 images."
    search.fill("bus14 dog")
    assert "a dog on road14" in captions(page) and len(captions(page)) == 11  # 14 and 140 to 149
    search.fill("0077.jpg")
    assert captions(page) == ["a dog on road77"]
    search.fill("timeout")
    assert len(captions(page)) == 3
    search.fill("nothing like this")
    assert captions(page) == []
    page.get_by_role("button", name="Show all").click()
    assert found(page) == "155 images." and search.input_value() == ""


def test_rows_are_drawn_as_they_come_into_view(runs: list[str], opened: Opened) -> None:
    page = opened(runs[0])
    assert len(captions(page)) < IMAGES
    for _ in range(10):
        page.mouse.wheel(0, 20_000)
        page.wait_for_timeout(50)
    page.wait_for_function("document.querySelectorAll('#grid .card').length === 155")


def test_filters_leave_what_they_say_and_can_be_joined(runs: list[str], opened: Opened) -> None:
    page = opened(runs[0])
    low, failed = filter_named(page, "Low score"), filter_named(page, "Failed")
    low.click()
    assert low.get_attribute("aria-pressed") == "true"
    lowest = captions(page)
    assert 5 <= len(lowest) <= 9 and lowest[0] == "a dog on road0"
    filter_named(page, "Copied").click()
    assert captions(page) == []
    filter_named(page, "Copied").click()
    low.click()
    filter_named(page, "Empty").click()
    assert captions(page) == ["an empty caption"]
    filter_named(page, "Empty").click()
    failed.click()
    assert len(captions(page)) == 5
    page.get_by_label("Error code").select_option("empty")
    assert found(page) == "2 of 155 images."
    failed.click()
    assert found(page) == "155 images."


def test_an_error_of_the_table_leads_to_its_images(runs: list[str], opened: Opened) -> None:
    page = opened(runs[0])
    page.get_by_role("tab", name="Errors").click()
    row = page.get_by_role("row", name=re.compile("^timeout"))
    assert "1.9%" in row.inner_text() and MARKUP in row.inner_text()
    row.get_by_role("button", name="Show images").click()
    assert found(page) == "3 of 155 images."
    assert page.locator("#captions").is_visible() and page.locator("#errors").is_hidden()


def test_images_are_sorted_by_their_figures(runs: list[str], opened: Opened) -> None:
    page = opened(runs[0])
    order = page.get_by_label("Sort by")
    order.select_option(label="CLIP score, highest")
    assert captions(page)[0] == MARKUP
    assert captions(page)[1] == "a dog on road149"
    order.select_option(label="CLIP score, lowest")
    assert captions(page)[0] == "a dog on road0"
    order.select_option(label="Name")
    assert captions(page)[0] == "a dog on road0"


def test_a_bar_of_a_histogram_leads_to_its_captions(runs: list[str], opened: Opened) -> None:
    page = opened(runs[0])
    page.get_by_role("tab", name="Distributions").click()
    bars = page.get_by_role("group", name="CLIP score").get_by_role("button")
    label = bars.nth(0).get_attribute("aria-label") or ""
    count = int(label.rpartition(": ")[2])
    bars.nth(0).click()
    assert found(page) == f"{count} of 155 images."
    page.locator(".filters .range").click()
    assert found(page) == "155 images."


def test_everything_can_be_done_by_keyboard(runs: list[str], opened: Opened) -> None:
    page = opened(runs[0])
    focused = "document.activeElement.textContent"
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "query"
    page.keyboard.type("road1")
    page.keyboard.press("ArrowDown")
    assert "road1" in page.evaluate(focused)
    page.keyboard.press("ArrowRight")
    assert "road10" in page.evaluate(focused)
    page.keyboard.press("ArrowDown")
    below = page.evaluate(focused)
    page.keyboard.press("ArrowUp")
    assert "road10" in page.evaluate(focused) and below != page.evaluate(focused)
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    assert "a dog on road10" in dialog.inner_text() and "2 of" in dialog.inner_text()
    page.keyboard.press("ArrowRight")
    assert "a dog on road11" in dialog.inner_text()
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert "road11" in page.evaluate(focused), "the focus is where one has been"
    page.get_by_role("tab", name="Captions").focus()
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("tab", name="Distributions").get_attribute("aria-selected") == "true"
    page.keyboard.press("End")
    assert page.locator("#identity").is_visible()


def test_markup_is_shown_as_text_everywhere(runs: list[str], opened: Opened) -> None:
    page = opened(*runs)
    assert page.locator("img:not([src^='data:'])").count() == 0
    page.get_by_role("searchbox").fill("onerror")
    assert MARKUP in captions(page)
    page.locator(".card", has_text=f"{MARKUP}.jpg").first.click()
    assert page.get_by_role("dialog").inner_text().count(MARKUP) >= 5
    assert page.locator("dialog script").count() == 0


def test_a_card_shows_its_image_or_why_there_is_none(runs: list[str], opened: Opened) -> None:
    page = opened(runs[0])
    page.get_by_role("searchbox").fill("road5")
    page.wait_for_function("document.querySelector('.card img').naturalWidth === 60")
    page.get_by_role("searchbox").fill("0008.jpg")
    assert "The image does not exist." in page.locator(".card").inner_text()


def test_a_caption_is_shown_whole(runs: list[str], opened: Opened) -> None:
    page = opened(runs[0])
    page.get_by_role("searchbox").fill("0033.jpg")
    page.locator(".card").click()
    dialog = page.get_by_role("dialog")
    text = dialog.inner_text()
    for said in ("a dog on road33", "0.165", "a bus33", "0.900", "50%", "60 × 40", "photos/0033.jpg"):
        assert said in text
    assert dialog.locator("mark").all_inner_texts()[0] == "a dog on"
    assert dialog.get_by_role("button", name="Next").is_disabled()
    dialog.get_by_role("button", name="Close").click()
    assert not dialog.is_visible()


def test_two_runs_are_side_by_side(runs: list[str], opened: Opened) -> None:
    page = opened(*runs)
    filter_named(page, "Changed").click()
    assert captions(page) == ["a dog on road20", "a cat on road20", "a dog on road40", "a cat on road40"]
    assert page.locator("#grid ins").all_inner_texts() == ["dog", "cat", "dog", "cat"]
    page.locator(".card").first.click()
    titles = page.get_by_role("dialog").locator(".of-run h2").all_inner_texts()
    assert [title.replace("\n", "") for title in titles] == ["Aa dog on road20", "Ba cat on road20"]
    page.keyboard.press("Escape")
    page.get_by_role("tab", name="Distributions").click()
    assert page.get_by_role("group", name="CLIP score").locator("span").count() >= 20


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_in_dark(runs: list[str], opened: Opened, scheme: str) -> None:
    page = opened(*runs, color_scheme=scheme)
    colours = """(selector) => { const style = getComputedStyle(document.querySelector(selector));
        let place = document.querySelector(selector), paper = "rgba(0, 0, 0, 0)";
        for (; paper === "rgba(0, 0, 0, 0)"; place = place.parentElement)
            paper = getComputedStyle(place).backgroundColor;
        return [style.color, paper]; }"""
    places = ["h1", ".path", ".tiles small", "[role=tab]", ".count", "#query", ".card .caption", ".card .name"]
    contrasts = {place: contrast(*page.evaluate(colours, place)) for place in [*places, ".badge.a", ".badge.b"]}
    assert min(contrasts.values()) >= 4.5, contrasts
    is_dark = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) < 0.2
    assert is_dark == (scheme == "dark")


def luminance(colour: str) -> float:
    channels = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
    linear = [channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4 for channel in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """The contrast of two colours as WCAG 2 defines it, 1 to 21."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_a_phone_shows_it_without_scrolling_sideways(runs: list[str], opened: Opened) -> None:
    page = opened(*runs, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    width = "document.documentElement.scrollWidth"
    for tab in page.get_by_role("tab").all():
        tab.tap()
        assert page.evaluate(width) == 360, tab.inner_text()
    page.get_by_role("tab", name="Captions").tap()
    page.locator(".card").first.tap()
    dialog = page.get_by_role("dialog")
    assert dialog.bounding_box() == {"x": 0, "y": 0, "width": 360, "height": 740}
    assert page.evaluate(
        "(() => { const s = document.querySelector('.sheet'); return s.scrollWidth <= s.clientWidth; })()"
    )
    dialog.get_by_role("button", name="Close").tap()
    assert not dialog.is_visible()


def test_speed_is_drawn_by_stage_over_time(runs: list[str], opened: Opened) -> None:
    page = opened(runs[0])
    page.get_by_role("tab", name="Speed").click()
    image = page.get_by_role("img", name="Images per second by stage")
    assert image.get_attribute("aria-label") == "Images per second by stage: 80 loaded, 80 captioned, 80 written"
    assert image.locator("path").count() == 3


def test_a_datastore_is_searched_and_sorted(opened: Opened, publish_index: PublishIndex, tmp_path: Path) -> None:
    texts = [f"a dog {number}" for number in range(40)] + [MARKUP, "dog a 3", "a very long caption of a red bus"]
    images = [["a.jpg"] if number == 5 else None for number in range(len(texts))]
    publish_index(str(tmp_path / "index"), unit_vectors(len(texts)), texts, images)
    page = opened(str(tmp_path / "index"))
    assert found(page) == "43 captions."
    page.get_by_label("Sort by").select_option(label="Longest")
    assert captions(page)[0] == texts[-1]
    filter_named(page, "With an image").click()
    assert captions(page) == ["a dog 5"]
    filter_named(page, "With an image").click()
    page.get_by_role("searchbox").fill("onerror")
    assert captions(page) == [MARKUP]
    page.locator(".card").click()
    assert MARKUP in page.get_by_role("dialog").inner_text()
    page.keyboard.press("Escape")
    page.get_by_role("tab", name="Nearly the same").click()
    assert page.locator(".group li").all_inner_texts() == ["a dog 3", "dog a 3"]
