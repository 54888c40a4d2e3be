"""What a config file or a `--set` may be, and what is refused with one message, whatever PyYAML makes of it."""

from itertools import pairwise
from pathlib import Path

import pytest

from smallcap.errors import ConfigError, StorageError
from smallcap.option_files import parse_value, read_option_file

BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghi"))
NOT_YAML = {
    "no token": "@id",
    "never closed": "[1",
    "an alias": "&a [*a]",
    "a bomb": BOMB,
    "merged keys": "a: &a {k: 1}\nb: {<<: [*a, *a]}",
    "a key twice": "model: a\nmodel: b",
    "a key twice within": "retrieval: {k: 1, k: 2}",
    "too deep": "[" * 5_000,
    "a day that is none": "2020-13-45",
    "no digits": "0b_",
    "an empty number": "!!int ''",
    "an empty float": "!!float ''",
    "no truth": "!!bool maybe",
    "no time": "!!timestamp soon",
    "an object": "!!python/object/apply:os.system [ls]",
    "a bell": "\x07",
    "half a character": "\ud800",
    "a list as a key": "? [a]\n: b",
    "too many digits": "9" * 5_000,
    "two documents": "a\n---\nb",
}


@pytest.mark.parametrize("text", NOT_YAML.values(), ids=NOT_YAML.keys())
def test_what_is_no_yaml_is_one_short_message(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^This is not YAML as options are written\.\n  where: here\n") as caught:
        parse_value(text, "here")
    assert len(str(caught.value).splitlines()) == 4
    assert len(str(caught.value)) < 500


def test_a_message_says_what_is_wrong_and_where() -> None:
    with pytest.raises(ConfigError, match=r"found: 'model' is given twice \(line 2, column 1\)"):
        parse_value("model: a\nmodel: b", "here")
    with pytest.raises(ConfigError, match=r"found: an alias \(\*name\); write its value out"):
        parse_value("a: &a 1\nb: *a", "here")


def test_values_have_the_types_of_yaml() -> None:
    assert parse_value("{a: 3, b: [x, 'y'], c: null, d: .5, e: true, f: !!str 7}", "here") == {
        "a": 3, "b": ["x", "y"], "c": None, "d": 0.5, "e": True, "f": "7"
    }  # fmt: skip


@pytest.mark.parametrize("content", [b"- a\n- b\n", b"a: [", b"just words", b"\x89PNG\r\n\x1a\n\0\0", b"a: \xff"])
def test_a_config_file_that_is_no_mapping_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        read_option_file(f"{tmp_path}/run.yaml")


def test_a_config_file_that_cannot_be_read_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "large.yaml").write_bytes(b"#" * (1 << 20) + b"\n")
    (tmp_path / "empty.yaml").touch()
    assert read_option_file(f"{tmp_path}/empty.yaml") == {}
    for name in ("nothing.yaml", "", "large.yaml", "a\0b", "a" * 300):
        with pytest.raises(ConfigError, match=r"where: --config "):
            read_option_file(f"{tmp_path}/{name}")
    for uri in ("/dev/zero", "nosuchscheme://a/b.yaml"):
        with pytest.raises(ConfigError, match=r"where: --config "):
            read_option_file(uri)


def test_a_service_that_fails_is_no_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(uri: str) -> None:
        raise StorageError("Cannot read this file.", where=uri) from ConnectionError("down")

    monkeypatch.setattr("smallcap.storage.open_ranged", fail)
    with pytest.raises(StorageError, match="Cannot read this file"):
        read_option_file("s3://bucket/run.yaml")
