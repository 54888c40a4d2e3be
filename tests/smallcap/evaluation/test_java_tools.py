"""Whether Java runs, in real processes that have none, a stub, or no pycocoevalcap."""

from pathlib import Path

import pytest

from smallcap.errors import RunError
from smallcap.evaluation.java_tools import has_java, run_java
from tests.python_process import run_python

_HAS_JAVA = "from smallcap.evaluation.java_tools import has_java; print(has_java())"


def test_a_java_that_is_not_there_or_does_not_start_is_none(tmp_path: Path) -> None:
    assert run_python(_HAS_JAVA, PATH=str(tmp_path)) == "False\n"
    stub = tmp_path / "java"
    stub.write_text("#!/bin/sh\necho 'No Java runtime present, requesting install.' >&2\nexit 1\n")
    stub.chmod(0o755)
    assert run_python(_HAS_JAVA, PATH=f"{tmp_path}:/bin:/usr/bin") == "False\n"


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
