"""The shell completes commands, options and their values, and the completion can be installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def smallcap(*arguments: str, **environment: str) -> str:
    given = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, "-m", "smallcap", *arguments]
    return subprocess.run(command, env=given, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("smallcap cap", {"caption"}),
        ("smallcap index ", {"list", "use", "gc"}),
        ("smallcap caption --num-b", {"--num-beams"}),
        ("smallcap caption --decode ", {"exact", "fast"}),
        ("smallcap config init e", {"evaluate"}),
    ],
)
def test_bash_is_told_what_may_follow(typed: str, expected: set[str]) -> None:
    words = typed.split(" ")
    environment = {"COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1), "_SMALLCAP_COMPLETE": "complete_bash"}
    assert set(smallcap(**environment).split()) == expected


def test_it_is_installed_for_the_shell_that_asks(tmp_path: Path) -> None:
    script = f"{sys.executable} -m smallcap --install-completion; true"  # so that bash stays its parent
    done = subprocess.run(
        ["bash", "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert "completion installed" in done.stdout, done.stderr
    assert "smallcap.sh" in (tmp_path / ".bashrc").read_text()
    assert "_SMALLCAP_COMPLETE=complete_bash" in (tmp_path / ".bash_completions" / "smallcap.sh").read_text()
