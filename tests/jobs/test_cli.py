"""The command line as a user meets it, in this process; every option of it is in terminal/test_command_line.py."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from jobs.cli import app
from jobs.terminal.command_line import run_app
from smallcap import __version__
from tests.in_process_ray import in_process_ray

runner = CliRunner()


def invoke(*arguments: str) -> str:
    result = runner.invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def index(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("cli")
    captions = [f"{number} {noun}" for number in range(5) for noun in ("dogs", "buses")]
    (folder / "dump.csv").write_text("\n".join(["image,caption", *(f"{i}.jpg,{c}" for i, c in enumerate(captions))]))
    out = str(folder / "index")
    words = ["build-index", str(folder / "dump.csv"), "--out", out, "--encoder", f"hf:{tiny_clip}"]
    with in_process_ray():
        assert "10 captions of 10 rows" in invoke(*words)
        assert "Nothing to do" in invoke(*words)
    return out


@pytest.fixture
def photo(tmp_path: Path) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    return str(tmp_path / "photo.jpg")


def test_search_by_text_finds_the_text_itself(index: str) -> None:
    found = json.loads(invoke("search", "--index", index, "--text", "3 dogs", "-k", "3", "--json").splitlines()[-1])
    assert len(found) == 3
    assert found[0]["text"] == "3 dogs"
    assert found[0]["score"] == pytest.approx(1, abs=1e-5)
    assert [n["score"] for n in found] == sorted((n["score"] for n in found), reverse=True)
    assert "3 dogs" in invoke("search", "--index", index, "--text", "3 dogs")


def test_search_by_image_finds_what_captioning_retrieves(index: str, photo: str, tiny_smallcap: Path) -> None:
    from smallcap.captioner import Captioner

    found = json.loads(invoke("search", "--index", index, "--image", photo, "-k", "4", "--json").splitlines()[-1])
    (result,) = Captioner.from_pretrained(str(tiny_smallcap), index).caption([Path(photo).read_bytes()])
    assert [n["caption_id"] for n in found] == [n.caption_id for n in result.neighbours]


def test_caption_and_inspect(index: str, photo: str, tiny_smallcap: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    printed = invoke("caption", photo, "--index", index, "--model", str(tiny_smallcap), "--out", out, "-k", "2")
    assert "Captioned 1 image in" in printed
    assert "1 row: 1 ok, 0 errors" in printed
    run = json.loads(invoke("inspect", out, "--json").splitlines()[-1])
    assert (run["kind"], run["status"], run["images"]["ok"]) == ("run", "complete", 1)
    assert run["samples"][0]["image_id"] == "photo.jpg"
    assert len(run["samples"][0]["neighbours"]) == 2
    assert "photo.jpg" in invoke("inspect", out)
    facts = json.loads(invoke("inspect", index, "--json").splitlines()[-1])
    assert (facts["kind"], facts["ntotal"], facts["index_key"]) == ("index", 10, "Flat")
    assert facts["index_id"] == run["index_id"]
    assert facts["recall"]["recall@4"] == 1.0
    assert set(facts) >= {"nprobe", "dropped", "samples"}
    assert "1 dogs" in invoke("inspect", index, "--samples", "10")


def test_an_index_is_added_to_removed_from_and_gone_back_in(index: str, tmp_path: Path) -> None:
    mine = str(tmp_path / "index")
    shutil.copytree(index, mine)
    (tmp_path / "more.csv").write_text("image,caption\nx.jpg,a grey whale\nx.jpg,3 dogs\n")
    dump = str(tmp_path / "more.csv")
    dry = invoke("build-index", dump, "--add", "--out", mine, "--dry-run")
    assert "1 new caption of 2 rows; dropped: 1 duplicate" in dry
    assert "1 caption to embed" in dry
    assert "11 captions (1 new, 1 of them embedded now)" in invoke("build-index", dump, "--add", "--out", mine)
    assert "a grey whale" in invoke("search", "--index", mine, "--text", "a grey whale", "-k", "1")
    removed = invoke("build-index", "--remove", "text=A Grey Whale", "--remove", "image=0.jpg", "--out", mine)
    assert "9 captions of 12 rows" in removed
    assert "2 removed" in removed
    assert "grey whale" not in invoke("search", "--index", mine, "--text", "a grey whale", "-k", "10")
    versions = json.loads(invoke("index", "list", mine, "--json").splitlines()[-1])
    assert [(version["operation"], version["current"]) for version in versions] == [
        ("remove", True),
        ("add", False),
        ("build", False),
    ]
    assert versions[1]["index_id"] in invoke("index", "list", mine)
    assert versions[1]["index_id"] in invoke("index", "use", mine, "previous")
    facts = json.loads(invoke("inspect", mine, "--json").splitlines()[-1])
    assert (facts["index_id"], facts["ntotal"]) == (versions[1]["index_id"], 11)
    assert "Would remove 2 versions, " in invoke("index", "gc", mine, "--grace", "0s", "--keep", "0", "--dry-run")
    gone = json.loads(invoke("index", "gc", mine, "--grace", "0s", "--keep", "0", "--json").splitlines()[-1])
    assert sorted(gone["versions"]) == sorted(versions[number]["index_id"] for number in (0, 2))
    assert "a grey whale" in invoke("search", "--index", mine, "--text", "a grey whale", "-k", "1")


def test_flags_of_every_kind_reach_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[Any, ...]] = []
    monkeypatch.setattr("jobs.caption.run", lambda *given, **named: called.append((*given, named)))
    monkeypatch.setattr("jobs.caption.describe", lambda summary: "")
    monkeypatch.setattr("jobs.caption.exit_status", lambda config, summary: 3)
    monkeypatch.setattr("jobs.caption.explain_exit", lambda config, summary: "why")
    arguments = "caption a b --model m --out o -k 0 --keep-columns x,y --keep-columns z --no-clip-score --top-p 0.5"
    done = runner.invoke(
        app, [*arguments.split(), "--set", "generation.do_sample=true", "--address", "auto", "--relist"]
    )
    assert done.exit_code == 3, done.output
    ((config, address, named),) = called
    assert (config.images, config.model, config.out, config.retrieval.k) == (("a", "b"), "m", "o", 0)
    assert (config.keep_columns, config.output.clip_score) == (("x", "y", "z"), False)
    assert (config.generation.top_p, config.generation.do_sample) == (0.5, True)
    assert (address, named) == ("auto", {"retry_failed": False, "relist": True})


def test_version() -> None:
    assert invoke("--version").strip() == __version__


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["caption", "photos", "--index", "i", "--model", "demo"], 2, "Give --out"),
        (["caption", "photos", "--model", "demo", "--out", "o"], 2, "give --index"),
        (["caption", "p", "--index", "i", "--model", "m", "--out", "o", "--set", "retrival.k=1"], 2, "retrieval"),
        (["caption", "p", "--config", "/nowhere.yaml"], 2, "/nowhere.yaml"),
        (["caption", "--retry-failed", "/nowhere"], 2, "no run in this folder"),
        (["inspect", "/nowhere"], 2, "nothing here that smallcap has written"),
        (["search", "--index", "/nowhere", "--text", "x"], 1, "no published index"),
        (["search", "--index", "/nowhere"], 2, "either --image or --text"),
        (["build-index", "/nowhere.csv", "--out", "o", "--encoder", "RN50"], 2, "open_clip:RN50x64/openai"),
        (["build-index", "--add", "a.csv", "--out", "o", "--encoder", "demo"], 1, "no published index to add to"),
        (["build-index", "a.csv", "--out", "o"], 2, "give --encoder"),
        (["build-index", "--remove", "everything", "--out", "o"], 2, "source=NAME"),
        (["index", "list", "/nowhere"], 1, "no published index"),
        (["index", "gc", "/nowhere", "--grace", "soon"], 2, "a duration such as 90s"),
        (["no-such-command"], 2, "No such command"),
    ],
)
def test_a_wrong_command_says_what_is_wrong_and_how_to_mend_it(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run_app(app, arguments)
    assert caught.value.code == code
    assert message in capsys.readouterr().err


def test_a_process_ends_with_one_message_and_the_status() -> None:
    command = [sys.executable, "-m", "jobs.cli", "caption", "photos", "--batch-size", "many"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 2
    index = "Besides, an index is needed for retrieval: give --index, or -k 0 to caption without retrieval."
    assert done.stderr == f"error: Options are missing.\n  remedy: Give --model and --out. {index}\n"
