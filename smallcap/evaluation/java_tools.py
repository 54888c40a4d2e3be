"""Java programs that pycocoevalcap brings: where they are, whether they run, and how they are called."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from smallcap.errors import ConfigError, RunError


def pycocoevalcap_folder() -> Path:
    """Returns the folder of the installed package `pycocoevalcap`, with its jar files.

    Raises:
        ConfigError: It is not installed.
    """
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "Caption metrics need pycocoevalcap, which is not installed.", remedy="pip install 'smallcap[eval]'"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def has_java() -> bool:
    """Says whether a Java program can run; a stub that only offers to install Java does not count."""
    java = shutil.which("java")
    return java is not None and _runs(java)


@functools.cache
def _runs(java: str) -> bool:
    try:
        return subprocess.run([java, "-version"], capture_output=True, check=False, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def run_java(options: Sequence[str], text: str, name: str) -> str:
    """Runs a Java program over a text.

    Args:
        options: Options of the command `java`.
        text: The program's input.
        name: What errors call the program.

    Returns:
        The program's output.

    Raises:
        RunError: The program ended with an error.
    """
    command = ["java", "-Dfile.encoding=UTF-8", *options]  # whatever the locale is
    done = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
    if done.returncode:
        raise RunError(
            f"{name} ended with an error.",
            where=" ".join(command),
            found=done.stderr.decode(errors="replace").strip()[-500:] or f"status {done.returncode}",
        )
    return done.stdout.decode()
