"""A config file to fill in: it loads, and what nobody changed is the default."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.cli import COMMANDS, app
from jobs.terminal.command_line import Command, run_app
from jobs.terminal.config_template import render_template
from smallcap.options import list_options, load_config

JOBS = [command for command in COMMANDS if any(option.key == "config" for option in command.options())]
# What options as a whole need besides those that are required.
NEEDED: dict[str, dict[str, Any]] = {
    "caption": {"index": "an-index"},
    "build-index": {"dumps": ["a.csv"], "encoder": "demo"},
    "forget": {"remove": ["text=given"]},
    "train": {"index": "an-index", "model": "demo"},
}


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        run_app(app, arguments)
    return int(ended.value.code or 0)


@pytest.mark.parametrize("command", JOBS, ids=lambda command: command.name)
def test_what_is_filled_in_gives_the_defaults(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, file = command.kinds[0], tmp_path / "config.yaml"
    assert run("config", "init", command.name) == 0
    printed = capsys.readouterr().out
    assert run("config", "init", command.name, "--out", str(file)) == 0
    assert file.read_text() == printed == render_template(command.name, kind)
    assert max(map(len, printed.splitlines())) <= 100
    values = yaml.safe_load(printed)
    required = {
        option.key: ["given"] if option.is_list else "given" for option in list_options(kind) if option.is_required
    }
    assert {key for key in required if values[key] is None} == set(required)
    filled = required | NEEDED.get(command.name, {})
    file.write_text(yaml.safe_dump(values | filled))
    assert load_config(kind, str(file)) == kind.model_validate(filled)


@pytest.mark.parametrize("command", JOBS, ids=lambda command: command.name)
def test_every_option_is_there_with_what_it_means(command: Command) -> None:
    text = render_template(command.name, command.kinds[0])
    words = " ".join(re.sub(r"(?m)^ *# ", " ", text).split())
    for option in list_options(command.kinds[0]):
        assert f"{' '.join(option.summary.split())}" in words
        if option.is_required:
            assert "[required" in words or "; required" in words


def test_what_has_no_value_yet_is_missing_and_a_flag_can_give_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(tmp_path / "caption.yaml")
    assert run("config", "init", "caption", "--out", file) == 0
    capsys.readouterr()
    assert run("caption", "--config", file, "-k", "0") == 2
    assert f"where: {file}\n  remedy: Give IMAGES, --model and --out." in capsys.readouterr().err
    taken: list[Any] = []
    monkeypatch.setattr("jobs.caption.run", lambda config, *_, **__: taken.append(config))
    monkeypatch.setattr("jobs.caption.describe", lambda summary: "")
    monkeypatch.setattr("jobs.caption.exit_status", lambda config, summary: 0)
    assert run("caption", "photos", "--config", file, "-k", "0", "--model", "m", "--out", "o") == 0
    assert (taken[0].images, taken[0].model, taken[0].retrieval.k) == (("photos",), "m", 0)


def test_a_file_that_is_there_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("limit: 5\n")
    assert run("config", "init", "caption", "--out", str(file)) == 2
    assert "There is a file already" in capsys.readouterr().err
    assert file.read_text() == "limit: 5\n"
    assert run("config", "init", "captoin") == 2
    assert "one of caption, refresh, forget, build-index, train, evaluate, bench" in capsys.readouterr().err
