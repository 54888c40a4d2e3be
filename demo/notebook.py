"""Executes docs/notebook.ipynb, and stores what its cells show.

Nothing is stored that differs from run to run or from machine to machine, such as times: what a newcomer reads is what
a test compares.

    python -m demo.notebook
"""

from __future__ import annotations

import os
import sys
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"
_LIMIT_S = 600  # for one cell


def read_notebook() -> Any:
    """Returns the notebook as it is stored."""
    return nbformat.read(NOTEBOOK, as_version=4)


def execute(notebook: Any) -> Any:
    """Returns a notebook with what its cells show today; it runs in an empty folder, with this Python.

    Raises:
        CellExecutionError: A cell has failed.
    """
    executed = deepcopy(notebook)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where the notebook finds `smallcap`
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            executed,
            timeout=_LIMIT_S,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        )
        client.execute(env=os.environ | {"PATH": path})
    executed.metadata = notebook.metadata  # without the version of this Python
    return executed


if __name__ == "__main__":
    nbformat.write(execute(read_notebook()), NOTEBOOK)
