"""The report as a command: what it reads, what it refuses, and that its page holds all and asks for nothing."""

import json
import re
import tarfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jobs import report
from jobs.caption import run as caption
from jobs.captioning.record import load_existing_run
from jobs.cli import app
from jobs.terminal.call_options import ReportOptions
from smallcap import storage
from smallcap.config import CaptionConfig
from smallcap.errors import ConfigError, ManifestError, SchemaError
from smallcap.report import thumbnails
from tests.caption_runs import config_for, jpeg
from tests.report_runs import caption_row, error_row, noise, write_photos, write_run

GOLDEN = Path(__file__).parents[1] / "golden"


class Page(HTMLParser):
    """What a browser makes of a page: its elements with their attributes, and its texts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._is_in_script = False
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self._is_in_script = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._is_in_script = False

    def handle_data(self, data: str) -> None:
        (self.scripts if self._is_in_script else self.texts).append(data)

    @property
    def data(self) -> dict[str, Any]:
        """The rows and charts that the page's script shows."""
        values: dict[str, Any] = json.loads(self.scripts[0])
        return values

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def page_of(*paths: str, out: Path, rows: int = 2000) -> Page:
    path, other = (*paths, None)[:2]
    assert path is not None
    report.run(ReportOptions(path=path, other=other, out=str(out), rows=rows))
    html = out.read_text()
    assert len(html.encode()) < 25_000_000
    return Page(html)


def test_a_run_of_version_1_is_shown_without_its_images(tmp_path: Path) -> None:
    page = page_of(str(GOLDEN / "run_v1"), out=tmp_path / "report.html")
    rows = page.data["rows"]
    assert [row["id"] for row in rows] == ["10000000.jpg", "10000001.jpg", "broken.jpg"]
    assert all("image" not in row or row["image"] is None for row in rows)
    assert all(row["missing"] for row in rows[:2])
    assert rows[0]["runs"][0]["caption"] == "a rocket and a dog above a tractor on a yellow background"
    for said in ("not_an_image", "33%", "demo@e2a6d95a4e14", "1adeb9c10471b38c", "generation.num_captions"):
        assert said in page.text


def test_a_run_is_captioned_and_shown_with_its_images(finished_run: CaptionConfig, anywhere: str) -> None:
    out = f"{anywhere}/report.html"
    printed = CliRunner().invoke(app, ["report", finished_run.out, "--out", out], catch_exceptions=False).output
    assert printed.splitlines()[-1].startswith(f"Report: {out}, 0.")
    assert printed.splitlines()[-1].endswith("MB, 9 of 9 images")
    page = Page(storage.read_bytes(out).decode())
    assert len(page.data["rows"]) == 9
    assert all(row["image"].startswith("data:image/webp;base64,") for row in page.data["rows"])
    (timeline,) = page.data["timelines"][0]
    assert sum(timeline["write"]) == sum(timeline["caption"]) == 9


def test_images_in_tars_are_shown(index: str, tiny_smallcap: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(5):
            (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
            tar.add(tmp_path / f"{number}.jpg", f"{number}.jpg")
    config = config_for(str(tmp_path / "a.tar"), index, tiny_smallcap, str(tmp_path / "out"))
    caption(config)
    rows = page_of(config.out, out=tmp_path / "report.html").data["rows"]
    assert [bool(row["image"]) for row in rows] == [True] * 5


def test_two_runs_are_shown_side_by_side(tmp_path: Path) -> None:
    uris = write_photos(tmp_path / "photos", 4)
    names = [uri.rpartition("/")[2] for uri in uris]
    first = [caption_row(name, "a dog", uri, 0.2) for name, uri in zip(names, uris, strict=True)]
    second = [*first[:2], caption_row(names[2], "a cat", uris[2], 0.4), error_row(names[3])]
    runs = [write_run(str(tmp_path / name), rows) for name, rows in (("before", first), ("after", second))]
    page = page_of(*runs, out=tmp_path / "report.html")
    rows = page.data["rows"]
    assert [row["changed"] for row in rows] == [False, False, True, True]
    assert all(row["image"] for row in rows), "one of the two runs could decode each"
    assert [run["count"] for run in page.data["measures"][0]["runs"]] == [4, 3]
    assert "2 50.0% of 4 shared images" in page.text


def test_an_index_is_shown(index: str, tmp_path: Path) -> None:
    page = page_of(index, out=tmp_path / "report.html", rows=5)
    assert (page.data["kind"], len(page.data["rows"])) == ("index", 5)
    assert {measure["name"] for measure in page.data["measures"]} == {"words", "characters"}
    for said in ("dump.csv", "Every row is in the index.", "vectors in the index", "Recall@4", "shows 5 of 16"):
        assert said in page.text
    golden = page_of(str(GOLDEN / "index_v1" / "index"), out=tmp_path / "golden.html")
    assert "removed after it was built" in golden.text or "duplicate" in golden.text


def test_a_page_asks_for_nothing_and_runs_only_its_own_script(finished_run: CaptionConfig, tmp_path: Path) -> None:
    page = page_of(finished_run.out, out=tmp_path / "report.html")
    assert not any({"src", "srcset", "data", "action", "ping"} & set(attributes) for _, attributes in page.elements)
    assert {attributes["href"] for _, attributes in page.elements if "href" in attributes} == {"#main"}
    (policy,) = (attributes["content"] for _, attributes in page.elements if "http-equiv" in attributes)
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy
    assert len(page.scripts) == 2
    css = "".join(re.findall(r"<style>(.*?)</style>", (tmp_path / "report.html").read_text(), re.S))
    assert "url(" not in css and "@import" not in css


MARKUP = "</script><script>alert(1)</script><img src=x onerror=alert(2)><!--"


def test_markup_in_captions_names_and_messages_is_text(tmp_path: Path) -> None:
    run = str(tmp_path / "<b>run<b>")
    rows = [
        caption_row(f"{MARKUP}.jpg", MARKUP, neighbours=[MARKUP]),
        error_row(f"x{MARKUP}", "truncated", MARKUP),
    ]
    page = page_of(write_run(run, rows), out=tmp_path / "report.html")
    tags = {tag for tag, _ in page.elements}
    assert not {"img", "b"} & tags
    assert len(page.scripts) == 2
    one, other = page.data["rows"]
    assert (one["id"], one["runs"][0]["caption"]) == (f"{MARKUP}.jpg", MARKUP)
    assert other["runs"][0]["message"] == MARKUP
    assert MARKUP in page.text and "<b>run<b>" in page.text


@pytest.mark.slow
def test_two_thousand_images_fit_whatever_they_are(tmp_path: Path) -> None:
    (tmp_path / "noise.png").write_bytes(noise(200))
    texts = [f"{number} " + "ä" * 400 for number in range(16)]
    rows = [caption_row(f"{n}.jpg", texts[n % 16], str(tmp_path / f"{n}.png"), n / 3000, texts) for n in range(2100)]
    for row in rows:
        Path(row["image_uri"]).hardlink_to(tmp_path / "noise.png")
    page = page_of(write_run(str(tmp_path / "run"), rows), out=tmp_path / "report.html")
    assert len(page.data["rows"]) == 2000
    assert "2,000 of 2,100" in page.text


def test_only_runs_are_compared_and_only_what_smallcap_wrote_is_shown(
    index: str, finished_run: CaptionConfig, tmp_path: Path
) -> None:
    out = str(tmp_path / "report.html")
    for paths in ((index, finished_run.out), (finished_run.out, index)):
        with pytest.raises(ConfigError, match="Only runs are shown side by side"):
            report.run(ReportOptions(path=paths[0], other=paths[1], out=out))
    with pytest.raises(ConfigError, match=r"(?s)nothing here.*a run \(_run.json\) or an index.*found: no such folder"):
        report.run(ReportOptions(path=str(tmp_path / "none"), out=out))
    with pytest.raises(ConfigError, match=r"found: 1 other file"):
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "a.txt").write_text("x")
        report.run(ReportOptions(path=finished_run.out, other=str(tmp_path / "folder"), out=out))
    assert not Path(out).exists()


def test_what_is_damaged_leaves_the_old_report(finished_run: CaptionConfig, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    out.write_text("before")
    run, index = tmp_path / "run", tmp_path / "index"
    for folder, name in ((run, "_run.json"), (index, "current.json")):
        folder.mkdir()
        (folder / name).write_text("{")
    with pytest.raises(SchemaError):
        report.run(ReportOptions(path=str(run), out=str(out)))
    with pytest.raises(ManifestError):
        report.run(ReportOptions(path=str(index), out=str(out)))
    assert out.read_text() == "before"


def test_a_report_does_not_touch_the_run(finished_run: CaptionConfig, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(finished_run.out).rglob("*")}
    page_of(finished_run.out, out=tmp_path / "report.html")
    assert {path: path.stat().st_mtime_ns for path in Path(finished_run.out).rglob("*")} == before
    assert load_existing_run(finished_run.out).status == "complete"


def test_a_run_that_was_stopped_before_its_first_row_is_shown(tmp_path: Path) -> None:
    run = write_run(str(tmp_path / "run"), [], status="stopped", attempts=())
    page = page_of(run, out=tmp_path / "report.html")
    assert "stopped" in page.text
    assert page.data["rows"] == [] and page.data["measures"] == []


def test_failed_images_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (uri,) = write_photos(tmp_path / "photos", 1)
    asked: list[str] = []
    monkeypatch.setattr(thumbnails, "_fetch", lambda uris, *_: asked.extend(uris) or [b""] * len(uris))
    run = write_run(str(tmp_path / "run"), [caption_row("a", "a dog", uri), error_row("b.jpg", "crashed")])
    page_of(run, out=tmp_path / "report.html")
    assert asked == [uri]
