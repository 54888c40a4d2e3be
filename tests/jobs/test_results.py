"""What commands print for people and for programs: -q, -v, --log-file and --json, as docs/formats.md says it."""

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import app
from jobs.cluster.stopping import Stopped
from jobs.terminal.command_line import run_app
from jobs.training.record import TrainRecord, write_train_record
from smallcap.config import CaptionConfig
from smallcap.errors import StorageError
from smallcap.model.files import checkpoint_id
from smallcap.output.reading import read_captions
from smallcap.training.checkpoints import EpochResult
from tests.caption_runs import write_images
from tests.index_files import build_text_index
from tests.train_runs import train_config, write_captioned_images

ROOT = Path(__file__).parents[2]
FORMATS = (ROOT / "docs" / "formats.md").read_text()
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command; returns its exit code, and what it printed to stdout and stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_app(app, [*map(str, arguments)])
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


def documented(section: str, is_dry_run: bool = False) -> set[str]:
    """Returns the fields that docs/formats.md names for a job, or for its dry run, with those of all commands."""
    text = FORMATS.partition("## What commands tell programs")[2].partition("\n## ")[0]
    common = text.partition("If a command fails")[0]
    own = text.partition(f"### `{section}`\n")[2].partition("\n### ")[0]
    parts = own.partition("With `--dry-run`:")
    rows = re.findall(r"^\| (`.*?`) \|", common + parts[2 if is_dry_run else 0], re.M)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def only_object(out: str) -> dict[str, Any]:
    """Returns the object that is all of stdout."""
    (line,) = out.splitlines()
    values: dict[str, Any] = json.loads(line, parse_constant=pytest.fail)
    return values


def test_caption_tells_programs_what_it_did(run: Run, index: str, tiny_smallcap: Path, tmp_path: Path) -> None:
    write_images(f"{tmp_path}/images", 3)
    (tmp_path / "images" / "bad.jpg").write_bytes(b"no image")
    command = ["caption", f"{tmp_path}/images", "--index", index, "--model", tiny_smallcap, "--out", f"{tmp_path}/out"]
    command += ["--dtype", "float32", "--json"]
    code, out, told = run(*command, "--dry-run")
    plan = only_object(out)
    assert code == 0
    assert plan.keys() == documented("caption", is_dry_run=True)
    assert (plan["command"], plan["status"], plan["exit_code"], plan["images"]) == ("caption", "planned", 0, 4)
    assert "Throughput:" in told
    assert not (tmp_path / "out").exists()

    code, out, told = run(*command, "--max-error-rate", "0.2")
    result = only_object(out)
    assert code == result["exit_code"] == 3
    assert result.keys() == documented("caption")
    assert (result["status"], result["new_images"], result["error_rate"]) == ("done", 4, 0.25)
    assert result["images"] == {"total": 4, "ok": 3, "error": 1, "errors_by_code": {"not_an_image": 1}}
    assert "4 rows: 3 ok, 1 error" in told
    reason = "Exit code 3: 1 of 4 rows are errors, 25.00%; --max-error-rate allows 20.00%."
    assert reason in told
    assert result["reason"].startswith(reason)

    code, out, told = run(*command)
    again = only_object(out)
    assert code == again["exit_code"] == 0
    assert again.keys() == documented("caption") - {"reason"}
    assert (again["status"], again["run_id"], again["seconds"]) == ("nothing_to_do", result["run_id"], None)
    assert "Exit code" not in told


def test_a_refresh_and_a_takedown_tell_programs_what_they_did(
    run: Run, tmp_path: Path, tiny_clip: Path, tiny_smallcap: Path
) -> None:
    index = build_text_index(tmp_path, tiny_clip, [f"{number}.jpg,a dog {number}" for number in range(9)])
    write_images(f"{tmp_path}/images", 3)
    (tmp_path / "images" / "bad.jpg").write_bytes(b"no image")
    old, new = tmp_path / "captions", tmp_path / "new"
    command = ["caption", tmp_path / "images", "--index", index, "--model", tiny_smallcap, "--out", old]
    run(*command, "--save-embeddings", "--max-error-rate", "0.2", "--dtype", "float32")
    text = read_captions(str(old), ["neighbours"], status="ok").to_arrow()["neighbours"][0][0]["text"].as_py()
    forget = ["forget", old, "--index", index, "--remove", f"text={text}", "--out", tmp_path / "clean", "--json"]

    plan = only_object(run(*forget, "--dry-run")[1])
    assert plan.keys() == documented("forget", is_dry_run=True)
    (use,) = plan["runs"]
    assert (use["run"], use["out"], use["images"] > 0) == (str(old), f"{tmp_path}/clean/captions", True)
    done = only_object(run(*forget)[1])
    assert done.keys() == documented("forget")
    assert (done["status"], done["captions"]) == ("done", 8)
    assert done["runs"][0]["refreshed"]["changes"] == use["images"]

    refresh = ["refresh", old, "--index", index, "--out", new, "--json"]
    plan = only_object(run(*refresh, "--dry-run")[1])
    assert plan.keys() == documented("refresh", is_dry_run=True)
    assert (plan["rows"], plan["looked_at"] - plan["same"], plan["unsearched"]) == (4, use["images"], 0)
    code, out, told = run(*refresh)
    result = only_object(out)
    assert result.keys() == documented("refresh")
    assert (code, result["exit_code"], result["new_images"]) == (3, 3, use["images"])
    assert result["refreshed"]["carried"] == 4 - use["images"]
    assert "Exit code 3: 1 of 4 rows are errors" in told


def test_a_build_tells_programs_what_it_did(run: Run, tiny_clip: Path, tmp_path: Path) -> None:
    (tmp_path / "dump.csv").write_text("caption\na dog\na cat\nA dog\n")
    command = ["build-index", tmp_path / "dump.csv", "--out", tmp_path / "index", "--encoder", f"hf:{tiny_clip}"]
    command += ["--json"]
    plan = only_object(run(*command, "--dry-run")[1])
    assert plan.keys() == documented("build-index", is_dry_run=True)
    assert (plan["status"], plan["rows"], plan["new_captions"]) == ("planned", 3, 2)
    result, again = (only_object(run(*command)[1]) for _ in range(2))
    assert result.keys() == again.keys() == documented("build-index")
    assert (result["status"], result["captions"], result["dropped"]["duplicate"]) == ("done", 2, 1)
    assert (again["status"], again["index_id"]) == ("nothing_to_do", result["index_id"])


def test_training_tells_programs_what_it_did(run: Run, index: str, tiny_smallcap: Path, tmp_path: Path) -> None:
    source, out = write_captioned_images(tmp_path / "data", 4), tmp_path / "out"
    command = ["train", source, "--index", index, "--model", tiny_smallcap, "--out", out, "--json"]
    command += ["--epochs", "2", "--set", "optimizer.batch_size=8", "--dtype", "float32", "--workers", "1"]
    plan = only_object(run(*command, "--dry-run")[1])
    assert plan.keys() == documented("train", is_dry_run=True)
    assert (plan["status"], plan["images"], plan["captions"], plan["epochs"]) == ("planned", 4, 8, 2)
    assert not out.exists()
    config = train_config(source, index, tiny_smallcap, out)
    ended = EpochResult(epoch=1, step=1, loss=2.0, validation_loss=None, cider=None)
    record = TrainRecord.new(config, None, None, start_id=checkpoint_id(str(tiny_smallcap)))
    update = {"status": "complete", "epochs": (ended,), "best_epoch": 1, "selected_by": "last"}
    write_train_record(str(out), record.model_copy(update=update))
    result = only_object(run(*command)[1])
    assert result.keys() == documented("train")
    assert (result["status"], result["new_steps"], result["model"]) == ("nothing_to_do", 0, f"{out}/model")


def test_an_evaluation_and_a_benchmark_end_with_their_object(run: Run, tmp_path: Path) -> None:
    (tmp_path / "references.csv").write_text("image,caption\n10000000.jpg,a rocket\n10000001.jpg,a whale\n")
    golden = ROOT / "tests" / "golden" / "run_v1"
    command = ["evaluate", golden, "--references", tmp_path / "references.csv", "--metrics", "bleu", "--bootstrap", "9"]
    code, out, told = run(*command, "--json", "--out", tmp_path / "result.json")
    result = only_object(out)
    assert code == 0
    stored = json.loads((tmp_path / "result.json").read_text())
    assert result == {"command": "evaluate", "status": "done", "exit_code": 0, **stored}
    assert "BLEU-4" in told
    assert "BLEU-4" in run(*command)[1]
    measured = ["bench", "--host", "--captions", "12000", "--repeats", "1", "--json", tmp_path / "bench.json"]
    code, out, told = run(*measured)
    assert (code, only_object(out)) == (0, json.loads((tmp_path / "bench.json").read_text()))
    assert "images/s for one Python thread" in told


ERROR_FIELDS = {"command", "status", "exit_code", "kind", "error", "where", "expected", "found", "remedy"}


@pytest.mark.parametrize(
    ("arguments", "code", "fields"),
    [
        (["caption"], 2, {"command": "caption", "kind": "ConfigError", "error": "Options are missing."}),
        (["caption", "--modle", "x"], 2, {"command": "caption", "where": "--modle", "remedy": "Did you mean --model?"}),
        (["no-such-command"], 2, {"command": None, "kind": "ConfigError"}),
        (["train", "a.csv", "--out", "o", "-k", "65"], 2, {"where": "--k", "found": "'65'", "command": "train"}),
        (["build-index", "none.csv", "--out", "o", "--encoder", "demo"], 1, {"kind": "StorageError"}),
        (["evaluate", "none", "--references", "none.csv"], 1, {"command": "evaluate"}),
        (["search", "--index", "none", "--text", "x"], 1, {"kind": "ManifestError", "where": "none"}),
        (["index", "list", "none"], 1, {"command": "index list"}),
        (["caption", "--log-file", "none/log", "a"], 2, {"where": "--log-file none/log"}),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else "",
)
def test_an_error_is_an_object_too(
    arguments: list[str],
    code: int,
    fields: dict[str, Any],
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    ended, out, told = run(*arguments, "--json")
    values = only_object(out)
    assert values.keys() == ERROR_FIELDS
    assert values.keys() - {"command", "status", "exit_code"} == documented_of_errors()
    assert ended == values["exit_code"] == code
    assert values["status"] == "failed"
    assert values["error"]
    assert {name: values[name] for name in fields} == fields
    assert f"error: {values['error']}" in told
    assert run(*arguments)[1] == ""  # without --json stdout has nothing


def documented_of_errors() -> set[str]:
    text = FORMATS.partition("If a command fails")[2].partition("A second Ctrl-C")[0]
    return {name for row in re.findall(r"^\| (`.*?`) \|", text, re.M) for name in re.findall(r"`(\w+)`", row)}


@pytest.mark.parametrize(
    ("raised", "code", "kind", "status"),
    [
        (Stopped("Stopped: 3 of 5 written", signal.SIGINT), 130, "Stopped", "stopped"),
        (Stopped("Stopped: 3 of 5 written", signal.SIGTERM), 143, "Stopped", "stopped"),
        (StorageError("The disk is full.", where="/out"), 1, "StorageError", "failed"),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError", "failed"),
    ],
)
def test_so_are_a_signal_and_a_fault_of_ours(
    raised: BaseException, code: int, kind: str, status: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr("jobs.caption.run", fail)
    ended, out, _ = run("caption", "a", "--model", "m", "--out", "o", "-k", "0", "--json")
    values = only_object(out)
    assert (ended, values["exit_code"], values["kind"], values["status"]) == (code, code, kind, status)
    assert values["error"] == (raised.what if isinstance(raised, StorageError) else str(raised))
    assert values["command"] == "caption"


STAMP = r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00 "


def test_a_quiet_command_prints_its_result_and_the_log_has_everything(
    run: Run, finished_run: CaptionConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("jobs.cluster.display._WORTH_A_LINE_S", 0.0)
    log, images = tmp_path / "log.txt", f"{tmp_path}/images"
    write_images(images, 2)
    words = ["caption", images, "--index", finished_run.index[0], "--model", finished_run.model, "--dtype", "float32"]
    code, out, told = run(*words, "--out", f"{tmp_path}/loud")
    assert code == 0
    assert "Listing the images of" in told
    assert "Captioned 2 images in" in out
    code, out, told = run(*words, "--out", f"{tmp_path}/quiet", "-q", "--log-file", log)
    assert code == 0
    assert out.splitlines() == ["2 rows: 2 ok, 0 errors", f"Parquet: {tmp_path}/quiet/part-*.parquet"]
    assert told == ""
    lines = log.read_text().splitlines()
    assert all(re.match(STAMP, line) for line in lines)
    written = "\n".join(re.sub(STAMP, "", line) for line in lines)
    assert "Listing the images of" in written
    assert "Captioned 2 images in" in written
    assert written.endswith(out.rstrip("\n"))
    assert len(re.findall(r"2 rows: 2 ok, 0 errors", written)) == 1

    code, out, told = run("caption", "--retry-failed", f"{tmp_path}/none", "-q", "--log-file", log)
    assert (code, out) == (2, "")
    assert "There is no run in this folder." in told
    added = log.read_text().splitlines()[len(lines) :]
    assert re.sub(STAMP, "", added[0]) == "error: There is no run in this folder."
    assert "\x1b" not in log.read_text()


def test_a_log_has_the_tables_and_what_libraries_warn_of(
    run: Run, finished_run: CaptionConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import logging
    import warnings

    from jobs import inspect

    look = inspect.inspect_path

    def warn(*given: Any) -> Any:
        logging.getLogger("some.library").warning("a file is \x1b[2Jodd")
        warnings.warn("this will change", UserWarning, stacklevel=1)
        return look(*given)

    monkeypatch.setattr(inspect, "inspect_path", warn)
    log = tmp_path / "log.txt"
    log.write_text("an earlier line\n")
    code, out, _ = run("inspect", finished_run.out, "--log-file", log)
    assert code == 0
    written = log.read_text()
    assert written.startswith("an earlier line\n")
    assert "WARNING some.library: a file is \\x1b[2Jodd" in written
    assert "this will change" in written
    lines = [re.sub(f"^{STAMP}", "", line).rstrip() for line in written.splitlines()]
    assert len(out.splitlines()) > 5
    assert [line for line in out.splitlines() if line.rstrip() not in lines] == []
    handlers = list(logging.getLogger().handlers)
    run("inspect", finished_run.out)
    assert list(logging.getLogger().handlers) == handlers, "the log is closed with its command"


def test_a_verbose_command_tells_its_settings_its_plan_and_each_step(
    run: Run, finished_run: CaptionConfig, tmp_path: Path
) -> None:
    images = f"{tmp_path}/images"
    write_images(images, 2)
    code, out, told = run(
        *["caption", images, "--index", finished_run.index[0], "--model", finished_run.model, "--dtype", "float32"],
        *["--out", f"{tmp_path}/out", "--seed", "7", "-v"],
    )
    assert code == 0
    assert "generation.seed = 7\n" in told
    assert "dry_run = false\n" in told
    assert re.search(r"^Plan: 1 actor on cpu in float32, batches of \d+, \d+ loading task", told, re.M)
    assert re.search(r"^Listing the images of .* in \d+ s$", told, re.M)
    assert "seed" not in out


def test_less_and_more_at_once_is_an_error(run: Run) -> None:
    code, _, told = run("inspect", "x", "-q", "-v")
    assert code == 2
    assert "--quiet prints less and --verbose prints more" in told
