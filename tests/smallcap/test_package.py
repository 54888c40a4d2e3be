from pathlib import Path

import pytest

import smallcap
from tests.python_process import run_python

_NEW = """
import sys
before = set(sys.modules)
{statement}
names = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(*sorted(names - sys.stdlib_module_names))
"""


def imported_by(statement: str) -> set[str]:
    """The packages outside the standard library that a statement imports into a new process."""
    return set(run_python(_NEW.format(statement=statement)).split())


def test_importing_smallcap_imports_nothing_else() -> None:
    assert imported_by("import smallcap; dir(smallcap)") == {"smallcap"}


@pytest.mark.parametrize(
    ("name", "heavy"),
    [
        ("RowError", {"numpy", "pyarrow", "fsspec", "pydantic"}),
        ("GenerationConfig", {"numpy", "pyarrow", "torch"}),
        ("read_captions", {"torch", "transformers", "faiss", "pandas", "open_clip"}),
    ],
)
def test_a_name_imports_no_more_than_it_needs(name: str, heavy: set[str]) -> None:
    assert not imported_by(f"import smallcap; smallcap.{name}") & (heavy | {"ray"})


@pytest.mark.parametrize("name", smallcap.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(smallcap, name) is not None
    assert name in dir(smallcap)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Captionr'"):
        smallcap.Captionr  # noqa: B018


def test_its_types_are_for_its_users_too() -> None:
    assert (Path(smallcap.__path__[0]) / "py.typed").is_file()
