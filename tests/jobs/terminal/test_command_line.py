"""Every option of every command: its flag, its help, and what is said of a wrong value. Nothing heavy is imported."""

import io
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.main import get_command

from jobs.cli import COMMANDS, app
from jobs.terminal.command_line import Command, run_app, show_usage
from smallcap.options import Option, list_options

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


def valid_for(option: Option) -> list[str]:
    """Returns arguments that give a required option a value of its form."""
    value = "text=given" if option.key == "remove" else re.sub("^one of |,.*", "", option.values) or "given"
    return [value] if option.is_positional else [option.names[-1], value]


def with_what_is_required(command: Command, *arguments: str) -> list[str]:
    given = [*command.name.split(), *arguments]
    for option in command.options():
        if option.is_required and not set(option.names) & set(arguments):
            given += valid_for(option)
    return given


@pytest.mark.parametrize("help_flag", ["-h", "--help"])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_says_everything_of_a_command(
    command: Command, help_flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(*command.name.split(), help_flag) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"Usage: smallcap {command.name}" in printed
    assert command.example in printed
    for option in command.options():
        assert f"{' '.join(show_usage(option).split())} {option.summary}" in printed
        assert option.summary.endswith("."), "an option has a docstring, of sentences"
        assert not option.is_required or f"{option.summary} [required" in printed
        assert option.is_switch or not option.default or f"default: {option.default}]" in printed


@pytest.mark.parametrize("group", [(), ("index",), ("config",)])
@pytest.mark.parametrize("help_flag", ["-h", "--help"])
def test_groups_of_commands_have_help(
    group: tuple[str, ...], help_flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(*group, help_flag) == 0
    assert "Usage: smallcap " in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_no_two_options_share_a_flag(command: Command) -> None:
    names = [name for option in command.options() for name in option.names]
    assert len(names) == len(set(names))


OTHERS = ("--shm-size", "--pids-limit", "--head", "--num-cpus", "--install-completion")  # of docker, Ray and typer


def flags(command: Command) -> set[str]:
    switches = {f"--no-{option.names[-1].removeprefix('--')}" for option in command.options() if option.is_switch}
    return switches | {name for option in command.options() for name in option.names}


@pytest.mark.parametrize("given", ["nothing", "what is required"])
@pytest.mark.parametrize(
    "command",
    [command for command in COMMANDS if any(option.is_required for option in command.options())],
    ids=lambda command: command.name,
)
def test_a_message_names_options_that_its_command_has(
    command: Command, given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = with_what_is_required(command) if given != "nothing" else command.name.split()
    if (command.name, given) == ("config init", "what is required"):
        return  # which is all it needs
    assert exit_status(*words) in (1, 2)
    message = capsys.readouterr().err
    named = [other for other in COMMANDS if f"smallcap {other.name}" in message]
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", message)) <= set().union(*map(flags, [command, *named]))
    if given == "nothing":
        required = [option.names[-1] for option in command.options() if option.is_required]
        assert [name for name in required if name not in message] == []
    assert list(tmp_path.iterdir()) == []


def test_all_flags_and_keys_that_texts_name_exist() -> None:
    options = [option for command in COMMANDS for option in command.options()]
    flags = {name for option in options for name in option.names} | {"--help", "--version", "--its-name", *OTHERS}
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
        given = ("junk",) if option.is_positional else (flag, "junk")
        assert exit_status(*in_place_of(option, command, list(given))) == 2
        assert f"where: {flag}\n  expected: {option.values}\n  found: 'junk'" in capsys.readouterr().err
    if not option.is_positional:
        assert exit_status(*command.name.split(), f"{flag}x", "junk") == 2
        assert f"There is no such option.\n  where: {flag}x\n  remedy: Did you mean --" in capsys.readouterr().err


NO_TEXT = ["", "\0", "a\0b", "\udcff", "caf\udce9"]
NO_NAME = ["  ", "\t", "a\x1b[2Jb", "\x7f", "\x85"]
NO_NUMBER = ["junk", "-1000", "nan", "-inf", "1e999", "9" * 30, "9" * 5000, "0x10", "1.5.2", "1,5", "٣٫٣", "true", "$N"]
NO_YAML = ["@id", "[1", "'", "%x", "a: b: c", "!!int ''", "0b_", "2020-13-45", "&a [*a]", "\x07", "? [a]"]
NO_VALUES: list[Any] = [{}, {"a": 1}, [{}], [[1]], [None], b"\xff", float("nan"), -float("inf"), 10**40]


def is_a_number(text: str) -> bool:
    try:
        return abs(float(text.strip().replace("_", ""))) < 1e6
    except ValueError:
        return False


def junk_texts(option: Option) -> st.SearchStrategy[str]:
    """Returns what may be typed for an option, and is no value of it."""
    texts = st.sampled_from([*NO_TEXT, *(() if option.any_text else NO_NAME)])
    if option.values:
        words = {"", *re.findall(r"[\w/-]+", option.values)}
        texts |= st.sampled_from(NO_NUMBER)
        texts |= st.text().filter(lambda text: not is_a_number(text) and not {*text.split(",")} & words)
    if option.has_commas and option.values:
        texts = texts.filter(lambda text: not all(is_a_number(item) for item in text.split(",")))
    return texts.filter(lambda text: not (option.is_positional and text.startswith("-")))


def refusal(*arguments: str) -> str:
    """Runs a command line that is wrong; returns its only message."""
    printed, said = io.StringIO(), io.StringIO()
    with redirect_stdout(printed), redirect_stderr(said):
        assert exit_status(*arguments) == 2
    assert not printed.getvalue() or "--json" in arguments
    message = said.getvalue()
    assert message.startswith("error: ")
    assert len(re.findall("(?m)^error: ", message)) == 1
    assert "Traceback" not in message
    assert len(message) < 2000
    return message


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_junk_in_any_option_starts_anything(
    command: Command, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("junk")
    config = folder / "config.yaml"
    option = data.draw(st.sampled_from([option for option in command.options() if not option.is_switch]))
    flag, in_config = option.names[-1], len(command.kinds) > 1 and option.group in groups_of(command.kinds[0])
    how = data.draw(st.sampled_from(["flag", *(["set", "set text", "file"] if in_config else [])]))
    if how == "flag":
        typed = [*([] if option.is_positional else [flag]), data.draw(junk_texts(option))]
        name = flag
    elif how == "set text":
        typed = ["--set", f"{option.key}={data.draw(st.sampled_from(NO_YAML))}"]
        name = f"(--set )?{option.key}"
    else:
        value = yaml.safe_dump({"value": data.draw(st.sampled_from(NO_VALUES))})[len("value:") :].strip()
        typed = ["--set", f"{option.key}={value}"]
        name = option.key
        if how == "file":
            *outer, last = option.key.split(".")
            inner = value.replace("\n", "\n    ")
            config.write_text("".join(f"{group}:\n  " for group in outer) + f"{last}:\n    {inner}\n")
            typed = ["--config", str(config)]
            name = f"{option.key} in {re.escape(str(config))}"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        message = refusal(*in_place_of(option, command, typed))
    assert re.search(rf"where: {name}\n  expected: .+\n  found: .", message), message
    assert [path for path in folder.iterdir() if path != config] == []


def groups_of(kind: Any) -> set[Any]:
    return {option.group for option in list_options(kind)}


def in_place_of(option: Option, command: Command, typed: list[str]) -> list[str]:
    """Returns a command line with all that is required, and with these arguments where the option would be."""
    arguments = command.name.split()
    for other in command.options():
        if other.key == option.key:
            arguments += typed
        elif other.is_required:
            arguments += valid_for(other)
    return arguments


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
        (["config"], "Usage: smallcap config "),
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
