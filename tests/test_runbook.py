"""The runbook has every code, fault, exit code and class of errors that the code has, and every alarm."""

import inspect
import re
from typing import get_args

import yaml

from jobs.cluster.faults import FaultKind
from jobs.cluster.stopping import SIGNALS, Stopped
from jobs.terminal import command_line
from smallcap import errors
from smallcap.errors import ErrorCode, SmallCapError
from tests.python_process import ROOT

TEXT = (ROOT / "docs" / "runbook.md").read_text()


def section(title: str) -> str:
    found = TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    assert found, title
    return found


def rows(title: str) -> list[list[str]]:
    """Returns the cells of the rows below a title whose first cell is a name or a number; none of them is empty."""
    found = re.findall(r"^\| (`?\w[\w`, ]*) \| (.+?) \| (.*?) ?\|$", section(title), re.M)
    return [list(cells) for cells in found]


def test_it_has_every_alarm() -> None:
    rules = yaml.safe_load((ROOT / "deploy" / "alarms.yaml").read_text())["groups"][0]["rules"]
    assert re.findall(r"^### `(\w+)`$", section("Alarms"), re.M) == [rule["alert"] for rule in rules]


def test_it_has_every_code_and_fault_with_what_to_do() -> None:
    for title, names in (
        ("Codes of images", [code.value for code in ErrorCode]),
        ("Faults of actors", get_args(FaultKind)),
    ):
        said = [cells for cells in rows(title) if cells[0].startswith("`")]
        assert [cells[0].strip("`") for cells in said] == list(names)
        assert all(means and do for _, means, do in said)


def test_it_has_every_way_to_end() -> None:
    cells = rows("When a command has ended")
    codes = {int(code) for first, *_ in cells for code in re.findall(r"\d+", first)}
    ours = {value for name, value in vars(command_line).items() if name.startswith("EXIT_")}
    assert codes == {0, *ours, *(128 + number for number in SIGNALS)}
    classes = {first.strip("`") for first, *_ in cells if first.startswith("`")}
    raised = {name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, SmallCapError)}
    assert classes == (raised - {"SmallCapError"}) | {Stopped.__name__}
