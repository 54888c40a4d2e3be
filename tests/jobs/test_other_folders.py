"""What works in the folder where a run began works in any other: retries, new listings, old records, old versions."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs.captioning.record import load_existing_run
from jobs.cli import app
from jobs.terminal.command_line import run_app
from tests.caption_runs import jpeg, read_rows, write_images


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        run_app(app, arguments)
    return int(ended.value.code or 0)


@pytest.fixture
def begun(tmp_path: Path, index: str, tiny_smallcap: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run of two images, one of them damaged; all is named by relative paths. We are elsewhere then."""
    home = tmp_path / "home"
    write_images(f"{home}/photos", 1)
    (home / "photos" / "bad.jpg").write_bytes(b"no image")
    shutil.copytree(index, home / "index")
    shutil.copytree(tiny_smallcap, home / "model")
    monkeypatch.chdir(home)
    words = "caption photos --index index --model model --out out/captions --dtype float32"
    assert run(*words.split()) == 0
    (home / "photos" / "bad.jpg").write_bytes(jpeg(1))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return home


def as_older_releases_wrote_it(home: Path) -> None:
    """Makes the paths in a run's record relative."""
    file = home / "out" / "captions" / "_run.json"
    values: dict[str, Any] = json.loads(file.read_text())
    values["config"] |= {"images": ["photos"], "index": "index", "model": "model", "out": "out/captions"}
    file.write_text(json.dumps(values))


def test_a_record_has_absolute_paths(begun: Path) -> None:
    config = load_existing_run(f"{begun}/out/captions").config
    assert {name: config[name] for name in ("images", "index", "model", "out")} == {
        "images": [f"{begun}/photos"],
        "index": f"{begun}/index",
        "model": f"{begun}/model",
        "out": f"{begun}/out/captions",
    }


@pytest.mark.parametrize("age", ["new", "old"])
def test_failed_images_are_tried_again_and_new_ones_found(
    age: str, begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if age == "old":
        as_older_releases_wrote_it(begun)
    out = f"{begun}/out/captions"
    assert run("caption", "--retry-failed", out) == 0
    assert "2 rows: 2 ok, 0 errors" in capsys.readouterr().out
    (begun / "photos" / "new.jpg").write_bytes(jpeg(2))
    assert run("caption", "--retry-failed", "--relist", "../home/out/captions") == 0
    assert list(read_rows(out).image_id) == ["000.jpg", "bad.jpg", "new.jpg"]
    words = f"{begun}/photos --index {begun}/index --model {begun}/model --dtype float32 --relist"
    assert run("caption", *words.split(), "--out", out) == 0, "the options are the same, however they are typed"
    assert len(read_rows(out)) == 3


def test_the_same_words_in_another_folder_are_other_options(
    begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(f"{tmp_path}/elsewhere/photos", 1)
    words = f"photos --index {begun}/index --model {begun}/model --dtype float32 --out {begun}/out/captions"
    assert run("caption", *words.split()) == 2
    assert f'images: ["{begun}/photos"] → ["{tmp_path}/elsewhere/photos"]' in capsys.readouterr().err


@pytest.mark.parametrize("left", ["another version", "nothing"])
def test_an_index_version_that_is_gone_has_a_message_of_its_own(
    left: str, begun: Path, tmp_path: Path, tiny_clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if left == "nothing":
        shutil.rmtree(begun / "index")
    else:
        (tmp_path / "dump.csv").write_text("caption\na whale\na rocket\na tree\na car\n")
        build = f"build-index {tmp_path}/dump.csv --out ../home/index --encoder hf:{tiny_clip}"
        assert run(*build.split()) == 0
        assert run("index", "gc", "../home/index", "--grace", "0s", "--keep", "0") == 0
    capsys.readouterr()
    for more in ((), ("--dry-run",)):
        assert run("caption", "--retry-failed", f"{begun}/out/captions", *more) == 1
        message = capsys.readouterr().err
        assert "error: The run's index version is gone." in message
        assert load_existing_run(f"{begun}/out/captions").index_id in message
        assert "remedy: " in message
    words = f"{begun}/photos --index {begun}/index --model {begun}/model --dtype float32 --out {begun}/out/captions"
    assert run("caption", *words.split()) == 0, "nothing is to do, and what is done needs no index"
