"""Python in a process of its own, for tests of what an environment lacks."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_python(script: str, **environment: str) -> str:
    """Runs a script with this checkout's packages; returns what it prints."""
    given = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, "-c", script], env=given, check=True, capture_output=True, text=True).stdout
