import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from smallcap.field_values import decode_json, id_strings, id_text, is_text, no_text, undecodable

BROKEN = pa.array([b"fine", b"caf\xe9", None, b"\xed\xa0\x80", b"a\x01", b"a\tb\n"]).view(pa.string())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("007", "007"),
        (7, "7"),
        (7.0, "7"),
        (1.5, "1.5"),
        (np.float32(1.1), "1.1"),
        (2**64, str(2**64)),
        *((value, None) for value in (None, True, math.nan, math.inf, [], {"a": 1})),
    ],
)
def test_an_id_is_what_the_source_says(value: Any, text: str | None) -> None:
    assert id_text(value) == text


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        (pa.array(["a", None]).dictionary_encode(), ["a", None]),
        (pa.array([7, None], pa.uint64()), ["7", None]),
        (pa.array([7.0, None, math.nan, 0.1, 2.0**53]), ["7", None, None, "0.1", str(2**53)]),
        (pa.array([1.1, 3.0], pa.float32()), ["1.1", "3"]),
        (pa.nulls(2), [None, None]),
        (pa.array([{"bytes": b"x", "path": "a.jpg"}, None]), ["a.jpg", None]),
        (pa.array([19723], pa.date32()), ["2024-01-01"]),
        (pa.array(["a"], pa.string_view()), ["a"]),
        (pa.array(["a"], pa.large_string()), ["a"]),
    ],
)
def test_a_column_of_ids_of_any_type(values: pa.Array, texts: list[str | None]) -> None:
    assert id_strings(values).to_pylist() == texts


def test_lists_are_no_ids() -> None:
    with pytest.raises(pa.ArrowException):
        id_strings(pa.array([], pa.list_(pa.int64())))


def test_control_codes_and_what_is_not_utf8_are_no_text() -> None:
    assert no_text(BROKEN).tolist() == [False, True, False, True, True, False]
    assert undecodable(BROKEN).tolist() == [False, True, False, True, False, False]
    lists = pa.ListArray.from_arrays([0, 1, 2, 2, 6], BROKEN)
    assert undecodable(lists).tolist() == [False, True, False, True]
    assert not undecodable(pa.array([1, 2])).any()


@pytest.mark.parametrize("text", ["a", "", "\t\n\r\x0b\x0c", "旅行\u3000", "👨\u200d👩", "\x85\xa0"])
def test_blanks_and_every_letter_are_text(text: str) -> None:
    assert is_text(text)
    assert not no_text(pa.array([text])).any()


@pytest.mark.parametrize("code", [*range(0x09), *range(0x0E, 0x1C), *range(0x7F, 0x85), *range(0x86, 0xA0)])
def test_control_codes_are_none(code: int) -> None:
    assert not is_text(f"a{chr(code)}")
    assert no_text(pa.array([f"a{chr(code)}"])).all()


def test_half_a_surrogate_pair_is_none() -> None:
    assert not is_text("\ud800")


def test_numbers_with_too_many_digits_are_infinite() -> None:
    assert decode_json("x" + "9" * 5000 + "y", 1) == (math.inf, 5001)
    with pytest.raises(ValueError, match="Expecting"):
        decode_json("nothing")
