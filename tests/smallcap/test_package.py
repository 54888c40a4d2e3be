import pytest

import smallcap
from tests.python_process import run_python


def test_importing_smallcap_is_light() -> None:
    heavy = "torch ray transformers faiss open_clip pyarrow"
    code = f"import sys, smallcap; print([name for name in '{heavy}'.split() if name in sys.modules])"
    assert run_python(code) == "[]\n"


@pytest.mark.parametrize("name", smallcap.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(smallcap, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Captionr'"):
        smallcap.Captionr  # noqa: B018
