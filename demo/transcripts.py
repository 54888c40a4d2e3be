"""Runs the commands of docs/transcripts.md, and puts what they print today into the page.

In its blocks of kind `console` a line that begins with `$ ` is a command for bash, and the lines after it are what it
printed. A line `^C` among these says that Ctrl-C is pressed once images are captioned. All commands run in one new
folder that looks like a checkout to them: `demo/` is there, and `out/` is written.

    python -m demo.transcripts
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "transcripts.md"
BLOCK = re.compile(r"(?<=^```console\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)
COLOUR = re.compile(r"\x1b\[[\d;]*m")  # Ray's commands write it into pipes as well
CTRL_C = "^C"
_UNDER_WAY = re.compile(r"captioned [1-9]")
_LATER_S = 10.0  # from then on to Ctrl-C
_COLUMNS = "100"  # of the terminal for which tables are laid out


def record_page(page: str) -> str:
    """Returns a page with new outputs of its commands; what they print is shown, too, while they run."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "demo").symlink_to(ROOT / "demo")
        return BLOCK.sub(lambda block: record_block(block[0], folder), page)


def record_block(block: str, folder: str) -> str:
    """Returns the lines of a block with new outputs of its commands, which run in a folder one after the other."""
    recorded: list[str] = []
    for text in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, *printed = text.splitlines()
        recorded += [f"$ {command}", *_run(command, folder, CTRL_C in printed)]
    return "".join(f"{line.replace(folder, '~/smallcap').rstrip()}\n" for line in recorded)


def _run(command: str, folder: str, is_stopped: bool) -> Iterator[str]:
    """Runs a command and yields what it prints.

    Raises:
        RuntimeError: It was to be stopped, and ended before.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background; what is started would ignore it as well
        signal.signal(signal.SIGINT, signal.default_int_handler)
    here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shell = subprocess.Popen(
        ["bash", "-c", command],
        cwd=folder,
        env=os.environ | {"PATH": here, "COLUMNS": _COLUMNS},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C reaches all that a command has started, but not this process
    )
    assert shell.stdout is not None
    for line in shell.stdout:
        sys.stderr.write(line)
        yield COLOUR.sub("", line.rstrip("\n"))
        if is_stopped and _UNDER_WAY.search(line):
            time.sleep(_LATER_S)
            os.killpg(shell.pid, signal.SIGINT)
            is_stopped = False
            yield CTRL_C
    shell.wait()
    if is_stopped:
        raise RuntimeError(f"{command} ended before it could be stopped")


if __name__ == "__main__":
    PAGE.write_text(record_page(PAGE.read_text()))
