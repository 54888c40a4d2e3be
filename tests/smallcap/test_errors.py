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


def test_what_comes_from_elsewhere_stays_in_its_line() -> None:
    found = "first\n\n  second\r\nremedy: \x1b[2J" + "x" * 5000 + "the end"
    error = ConfigError("It is\nwrong.", where="a\nremedy: b\u202e", found=found, remedy="Do\nso.")
    what, where, shown, remedy = str(error).splitlines()
    assert (what, where) == ("It is wrong.", "  where: a\\nremedy: b\\u202e")
    assert shown.startswith("  found: first second remedy: \\x1b[2Jxxx")
    assert shown.endswith("xxxthe end")
    assert len(shown) < 520
    assert remedy == "  remedy: Do so."
    assert error.found == found, "what code reads is unchanged"


def test_the_message_of_a_row_is_one_line() -> None:
    error = RowError(ErrorCode.EMPTY, "It is empty\nindeed.", where="s3://b/a\nb\x9b.jpg", remedy="Look.")
    assert str(error) == "It is empty indeed (s3://b/a\\nb\\x9b.jpg). Look."
    assert str(RowError(ErrorCode.EMPTY, "It is empty.")) == "It is empty."
    assert len(str(RowError(ErrorCode.EMPTY, "It is empty.", where="x" * 5000))) < 600
