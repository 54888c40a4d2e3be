"""Packages of the user's that have the names of ours; that the demo runs beside them is in tests/test_wheel.py."""

import importlib
from pathlib import Path

import pytest

from jobs.cluster.own_packages import worker_environment
from tests.python_process import ROOT, run_python

HOOK = {"worker_process_setup_hook": "smallcap.__main__.import_own_packages"}


@pytest.mark.parametrize("name", ["jobs.py", "jobs/__init__.py", "index_builder/__init__.py"])
def test_workers_are_told_where_others_have_their_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs").mkdir()  # a folder without __init__.py hides nothing
    assert worker_environment() is None
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("raise SystemExit('another package')")
    importlib.invalidate_caches()
    assert worker_environment() == HOOK


def test_what_they_are_told_imports_our_packages(tmp_path: Path) -> None:
    for name in ("jobs.py", "index_builder.py"):
        (tmp_path / name).write_text("raise SystemExit('another package')")
    script = (
        f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
        "from smallcap.__main__ import import_own_packages\n"
        "import_own_packages()\nimport index_builder, jobs\nimport_own_packages()\n"
        "from jobs.terminal import call_options\n"
        "print(jobs.__file__, index_builder.__file__, hasattr(jobs, 'terminal'))"
    )
    assert run_python(script).split() == [f"{ROOT}/jobs/__init__.py", f"{ROOT}/index_builder/__init__.py", "True"]
