"""Every option of every command: its flag, its help, and what is said of a wrong value. Nothing heavy is imported."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from jobs.cli import COMMANDS, app
from jobs.terminal.command_line import Command, run_app, show_usage
from smallcap.options import Option

SMALLCAP = get_command(app)  # built once
ROOT = Path(__file__).parents[3]
EVERY_OPTION = [
    pytest.param(command, option, id=f"{command.name} {option.names[-1]}")
    for command in COMMANDS
    for option in command.options()
]


def exit_status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        run_app(SMALLCAP, arguments)
    return int(caught.value.code or 0)


def with_what_is_required(command: Command, *arguments: str) -> list[str]:
    given = [*command.name.split(), *arguments]
    for option in command.options():
        if option.is_required and not set(option.names) & set(arguments):
            given += ["given"] if option.is_positional else [option.names[-1], "given"]
    return given


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_says_everything_of_a_command(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(*command.name.split(), "--help") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"Usage: smallcap {command.name}" in printed
    assert command.example in printed
    for option in command.options():
        assert f"{' '.join(show_usage(option).split())} {option.summary}" in printed
        assert option.summary.endswith("."), "an option has a docstring, of sentences"
        assert not option.is_required or f"{option.summary} [required" in printed
        assert option.is_switch or not option.default or f"default: {option.default}]" in printed


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_no_two_options_share_a_flag(command: Command) -> None:
    names = [name for option in command.options() for name in option.names]
    assert len(names) == len(set(names))


def test_all_flags_and_keys_that_texts_name_exist() -> None:
    options = [option for command in COMMANDS for option in command.options()]
    flags = {name for option in options for name in option.names} | {"--help", "--version", "--its-name"}
    keys = {option.key for option in options} | {"a.b"}
    code = [path for folder in ("smallcap", "index_builder", "jobs") for path in (ROOT / folder).rglob("*.py")]
    for path in [ROOT / "README.md", ROOT / "docs" / "reproduce.md", *code]:
        text = re.sub(r"git\(.*\)|\"nvidia-smi\".*|--no-", "", path.read_text())
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text)) <= flags, path
        assert set(re.findall(r"--set ([a-z_.]+)=", text)) <= keys, path


@pytest.mark.parametrize(("command", "option"), EVERY_OPTION)
def test_junk_is_refused_with_what_was_expected(
    command: Command, option: Option, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = option.names[-1]
    if option.is_switch:
        assert exit_status(*with_what_is_required(command, f"{flag}=junk")) == 2
        assert flag in capsys.readouterr().err
    elif option.values:
        assert exit_status(*with_what_is_required(command, flag, "junk")) == 2
        assert f"where: {flag}\n  expected: {option.values}\n  found: 'junk'" in capsys.readouterr().err
    if not option.is_positional:
        assert exit_status(*command.name.split(), f"{flag}x", "junk") == 2
        assert f"There is no such option.\n  where: {flag}x\n  remedy: Did you mean --" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["caption"], "Give IMAGES, --model and --out."),
        (["caption", "--generation.top-p", "0.5"], "Did you mean --top-p?"),
        (["caption", "photos", "-k"], "'-k' requires an argument"),
        (["search"], "Give --index."),
        (["inspect"], "Give PATH."),
        (["index", "use", "i"], "Give VERSION."),
        (["index", "use", "i", "v", "w"], "extra argument"),
        (["capt"], "Did you mean 'caption'?"),
        ([], "Usage: smallcap "),
        (["index"], "Usage: smallcap index "),
    ],
)
def test_a_wrong_command_line_is_a_usage_error(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(*arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert not printed.out


@pytest.mark.parametrize(
    ("module", "command"),
    [("caption", "caption"), ("build_index", "build-index"), ("train", "train"), ("evaluate", "evaluate")],
)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_a_jobs_module_is_its_command(
    module: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"jobs.{module}", "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module(f"jobs.{module}", run_name="__main__")
    assert not caught.value.code
    assert f"Usage: smallcap {command} " in capsys.readouterr().out


def test_help_and_wrong_options_wait_for_nothing_heavy() -> None:
    code = (
        "import sys\nfrom jobs.cli import app\nfrom jobs.terminal.command_line import run_app\n"
        "for arguments in (['caption', '--help'], ['caption', 'x', '--batch-size', 'many'], ['train'], ['--help']):\n"
        "    try:\n        run_app(app, arguments)\n    except SystemExit:\n        pass\n"
        "assert not {'torch', 'ray', 'numpy', 'pyarrow'} & sys.modules.keys()"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
