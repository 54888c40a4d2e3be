"""Whether Java runs, in real processes that have none, a stub, or no pycocoevalcap."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from smallcap.errors import RunError
from smallcap.evaluation.java_tools import has_java, run_java

ROOT = Path(__file__).parents[3]


def run_python(script: str, **environment: str) -> str:
    given = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, "-c", script], env=given, check=True, capture_output=True, text=True).stdout


def test_without_java_on_the_path_there_is_none(tmp_path: Path) -> None:
    assert (
        run_python("from smallcap.evaluation.java_tools import has_java; print(has_java())", PATH=str(tmp_path))
        == "False\n"
    )


def test_a_java_that_does_not_start_is_none(tmp_path: Path) -> None:
    stub = tmp_path / "java"
    stub.write_text("#!/bin/sh\necho 'No Java runtime present, requesting install.' >&2\nexit 1\n")
    stub.chmod(0o755)
    script = "from smallcap.evaluation.java_tools import has_java; print(has_java())"
    assert run_python(script, PATH=f"{tmp_path}:/bin:/usr/bin") == "False\n"


_WITHOUT_PYCOCOEVALCAP = """
import sys
from importlib.machinery import PathFinder
class Without:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name == "pycocoevalcap" else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Without
from smallcap.evaluation.caption_metrics import score_captions
from smallcap.errors import ConfigError
try:
    score_captions({"a": "x"}, {"a": ["x"]})
except ConfigError as error:
    print(error.remedy)
"""


def test_without_pycocoevalcap_the_remedy_is_named() -> None:
    assert run_python(_WITHOUT_PYCOCOEVALCAP) == "pip install 'smallcap[eval]'\n"


@pytest.mark.skipif(not has_java(), reason="no Java runs here")
def test_a_program_that_fails_is_an_error_with_its_own_words() -> None:
    with pytest.raises(RunError) as error:
        run_java(["no.such.Program"], "", "The program")
    assert error.value.what == "The program ended with an error."
    assert "no.such.Program" in error.value.found
