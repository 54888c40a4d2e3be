import pickle

import pytest

from smallcap import errors
from smallcap.errors import ConfigError, ErrorCode, RowError, SmallCapError


@pytest.mark.parametrize("cls", [getattr(errors, name) for name in errors.__all__ if name != "ErrorCode"])
def test_errors_survive_pickling(cls: type[SmallCapError]) -> None:
    parts = {"where": "s3://bucket/key", "remedy": "Look there."}
    error = cls(ErrorCode.EMPTY, "It is empty.", **parts) if cls is RowError else cls("It is empty.", **parts)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def test_a_message_says_what_where_expected_found_and_remedy() -> None:
    error = ConfigError("It is wrong.", where="here", expected="this", found="that", remedy="Do so.")
    lines = ["It is wrong.", "  where: here", "  expected: this", "  found: that", "  remedy: Do so."]
    assert str(error).splitlines() == lines
    assert str(ConfigError("It is wrong.")) == "It is wrong."
