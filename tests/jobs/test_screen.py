"""What is printed, whatever is in it, wherever it goes, and whoever reads it."""

import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.table import Table
from rich.text import Text

from jobs.screen import VisibleConsole, prepare, say, say_json
from jobs.terminal import console
from jobs.terminal.command_line import run_app
from smallcap.errors import StorageError
from smallcap.index.retriever import Neighbour
from tests.job_processes import MARK

ROOT = Path(__file__).parents[2]
EVIL = "a [red]dog[/red] :dog: \x1b]52;c;aGk=\x07\x1b[2J\x9b31m \u202egpj\u2066 \u200b\r\nerror: gone \udcff"
SHOWN = r"a [red]dog[/red] :dog: \x1b]52;c;aGk=\x07\x1b[2J\x9b31m \u202egpj\u2066 \u200b\r\nerror: gone \udcff"
READABLE = "мост, 犬と猫, می‌خواهم, क्‍ष, 👩‍🚀"
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def test_tables_show_what_is_in_them_and_obey_none_of_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for shown in (console.out, console.news):
        monkeypatch.setattr(shown, "width", 400, raising=False)
    console.print_neighbours([Neighbour(7, EVIL, 0.5), Neighbour(8, READABLE, 0.25)])
    console.print_swap([{"image": EVIL, "before": EVIL, "after": READABLE, "reference": EVIL}])
    console.print_facts({"sources": [{"name": EVIL, "uri": READABLE}], "samples": [{"caption": EVIL, "status": "ok"}]})
    version = {"operation": EVIL, "ntotal": 1, "index_key": EVIL, "recall": {}, "created_at": EVIL, "index_id": EVIL}
    console.print_versions([version | {"current": True}])
    printed = capsys.readouterr().out
    assert not STEERING.search(printed)
    assert printed.count(SHOWN) == 9
    assert printed.count(READABLE) == 3
    assert not re.search(r"(?m)^ *error: gone", printed)


def test_a_console_escapes_what_anyone_gives_it() -> None:
    written = io.StringIO()
    shown = VisibleConsole(written)
    table = Table(EVIL, box=None)
    table.add_row(EVIL)
    table.add_row(Text(EVIL, style="bold"))
    for given in (EVIL, Text(EVIL), table, Text.assemble((EVIL, "red"), EVIL)):
        shown.print(given)
    assert not STEERING.search(written.getvalue())
    assert "[red]dog[/red] :dog:" in written.getvalue()


def test_a_console_at_a_terminal_has_colours_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    written = io.StringIO()
    VisibleConsole(written).print(console.cell("\x1b[5m blinking", "red"))
    assert written.getvalue() == "\x1b[31m\\x1b[5m blinking\x1b[0m\n"


def test_lines_json_and_logs_are_safe(capsys: pytest.CaptureFixture[str]) -> None:
    prepare()
    say(EVIL + READABLE)
    say_json({"caption": EVIL + READABLE + "\x7f"})
    printed = capsys.readouterr().out
    assert not STEERING.search(printed)
    assert READABLE in printed
    assert json.loads(printed.splitlines()[-1]) == {"caption": EVIL + READABLE + "\x7f"}
    assert printed.splitlines()[-1].isascii()
    record = logging.getLogger("any").makeRecord("any", logging.WARNING, "f", 1, "of %s", (EVIL,), None)
    assert not STEERING.search(record.getMessage())


def test_errors_cannot_write_lines_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise StorageError(f"Cannot read {EVIL}.", where=EVIL, found=EVIL * 30, remedy=READABLE)

    with pytest.raises(SystemExit) as ended:
        run_app(fail)
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1
    assert [line.split(":")[0].strip() for line in lines] == ["error", "where", "found", "remedy"]
    assert not any(map(STEERING.search, lines))
    assert READABLE in lines[-1]


def test_a_fault_of_ours_is_a_traceback_that_steers_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError(EVIL)

    with pytest.raises(SystemExit) as ended:
        run_app(fail)
    printed = capsys.readouterr().err
    assert ended.value.code == 1
    assert "Traceback" in printed
    assert not STEERING.search(printed)


@pytest.fixture(scope="module")
def evil_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden run with captions, ids and messages that would steer a terminal."""
    folder = tmp_path_factory.mktemp("run")
    golden = ROOT / "tests" / "golden" / "run_v1"
    for path in golden.rglob("*"):
        if path.is_file():
            (folder / path.relative_to(golden)).parent.mkdir(parents=True, exist_ok=True)
            (folder / path.relative_to(golden)).write_bytes(path.read_bytes())
    for part in folder.glob("part-*.parquet"):
        table = pq.read_table(part)
        for name in ("image_id", "caption", "error_message"):
            values = [value and EVIL[:-1] + READABLE + str(row) for row, value in enumerate(table[name].to_pylist())]
            table = table.set_column(table.schema.get_field_index(name), table.field(name), pa.array(values))
        pq.write_table(table, part)
    return folder


SCRIPT = """
import sys
from jobs.cli import COMMANDS, app
from jobs.terminal.command_line import run_app
for arguments in (
    *([*command.name.split(), "--help"] for command in COMMANDS),
    ["--help"], ["index", "--help"], ["--version"], [], ["ca\\x1b[31mpt\\u202e"], ["caption", "--\\x1b[31m\\u732b"],
    ["caption", "photos", "--out", "\\u732b", "--model", "m", "--set", "\\x1b[31m\\u732b\\udcff"],
    ["inspect", "/\\u732b\\x1b[31m\\udcff"], ["inspect", RUN], ["inspect", RUN, "--json"],
):
    try:
        run_app(app, arguments)
    except SystemExit as ended:
        print("ended", ended.code)
"""


def run_script(script: str, **options: Any) -> "subprocess.CompletedProcess[Any]":
    environment = os.environ | {"PYTHONPATH": str(ROOT), MARK: ""} | options.pop("environment", {})
    return subprocess.run([sys.executable, "-c", script], check=False, env=environment, cwd=ROOT, **options)


@pytest.mark.parametrize(
    "encoding",
    [
        "ascii",
        "locale C",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("latin-1", "cp1252", "utf-8:strict")),
    ],
)
def test_any_encoding_of_the_terminal_will_do(encoding: str, evil_run: Path) -> None:
    environment = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment |= {"LC_ALL": "C"} if encoding == "locale C" else {"PYTHONIOENCODING": encoding}
    done = run_script(f"RUN = {str(evil_run)!r}\n{SCRIPT}", environment=environment, capture_output=True)
    out = done.stdout.decode("utf-8" if "utf" in encoding else "latin-1")
    errors = done.stderr.decode("utf-8" if "utf" in encoding else "latin-1")
    assert done.returncode == 0, errors
    assert "Traceback" not in out + errors
    assert set(re.findall(r"(?m)^ended (\w+)", out)) == {"0", "2"}
    assert not STEERING.search(out if "cp" not in encoding else ""), "cp1252 has letters where others have controls"
    assert not STEERING.search(errors)
    assert "犬" in out if "utf" in encoding else r"\u72ac" in out
    assert len([line for line in out.splitlines() if line.startswith("{") and json.loads(line)]) == 1


@pytest.mark.parametrize("arguments", [["caption", "--help"], ["--help"], ["--version"], ["inspect", "RUN"]])
def test_an_output_that_nobody_reads_ends_quietly(arguments: list[str], evil_run: Path) -> None:
    command = [argument.replace("RUN", str(evil_run)) for argument in arguments]
    script = f"import sys; from jobs.cli import main; sys.argv = ['smallcap', *{command!r}]; main()"
    reader, writer = os.pipe()
    os.close(reader)
    done = run_script(script, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
    with Path("/dev/full").open("w") as full:
        done = run_script(script, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[:2] == ["error: The output cannot be written.", "  where: stdout"]
    assert "No space left on device" in done.stderr
    assert len(done.stderr.splitlines()) == 4


def test_streams_that_are_closed_are_no_error(evil_run: Path) -> None:
    script = f"from jobs.cli import main; import sys; sys.argv = ['smallcap', 'inspect', {str(evil_run)!r}]; main()"
    command = f"{sys.executable} -c {json.dumps(script)}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        shell = ["sh", "-c", f"{command} {closed}"]
        done = subprocess.run(shell, check=False, env=environment, cwd=ROOT, capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")


PRINTS = re.compile(
    r"(?<![\w.])print\(|\b(?:typer|click)\.(?:echo|secho|style)|(?<!Visible)(?<!class )\bConsole\(|pprint\(|"
    r"sys\.(?:stdout|stderr)\.(?:write|buffer)|StreamHandler\(|print_exc\(|\bos\.write\("
)
OTHERS = {
    "smallcap/doctor/installation.py": 1,  # to a file: the output of a check's own process
    "jobs/log_file.py": 2,  # to the log, and that it cannot be written any more
}


def test_nothing_is_printed_by_another_way() -> None:
    found = {}
    for folder in ("smallcap", "index_builder", "jobs"):
        for path in (ROOT / folder).rglob("*.py"):
            count = len(PRINTS.findall(re.sub(r"(?m)#.*$|^ +def print\(", "", path.read_text())))
            if count and path.relative_to(ROOT).as_posix() != "jobs/screen.py":
                found[path.relative_to(ROOT).as_posix()] = count
    assert found == OTHERS
