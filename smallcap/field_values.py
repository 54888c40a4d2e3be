"""The values of an input's fields: what an id, a text and a number may be, wherever they are read from.

It knows nothing of files and formats.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_NO_TEXT = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")  # control codes, half a surrogate pair
_CONTROL_CODES = r"[\x00-\x08\x0e-\x1b\x7f-\x{84}\x{86}-\x{9f}]"  # the same for Arrow, whose strings have no surrogates


def id_text(value: Any) -> str | None:
    """Returns an id as text: numbers as they are written, 7.0 as 7; None where the value cannot be an id."""
    if isinstance(value, str):
        return value
    if isinstance(value, float | np.floating) and np.isfinite(value):
        return str(int(value)) if value.is_integer() else str(value)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def id_strings(values: pa.Array) -> pa.Array:
    """Returns a column of ids as strings, null where there is none; lists, images and captions have this one rule.

    A whole number is written without a point: integers become floats where a column has nulls (pandas). A struct is an
    image of Hugging Face, whose path is its id.

    Raises:
        pa.ArrowException: Values of this type are no ids.
    """
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_struct(values.type) and values.type.get_field_index("path") >= 0:
        values = pc.struct_field(values, "path")
    if pa.types.is_floating(values.type):
        return pa.array(map(id_text, values.to_numpy(zero_copy_only=False)), pa.string())
    return values.cast(pa.string())


def is_text(value: str) -> bool:
    """Says whether a string is text: it has neither control codes, other than blanks, nor half a surrogate pair."""
    return value.isprintable() or not _NO_TEXT.search(value)


def no_text(strings: pa.Array) -> np.ndarray:
    """Says of each string of a column, [n] bool, whether it is no text; see `is_text`. A null is none of these."""
    wrong = undecodable(strings)
    if wrong.any():
        strings = pc.if_else(pa.array(wrong), None, strings)
    codes = pc.fill_null(pc.match_substring_regex(strings, _CONTROL_CODES), False)
    return np.asarray(wrong | codes.to_numpy(zero_copy_only=False))


def undecodable(values: pa.Array) -> np.ndarray:
    """Says of each value of a column, [n] bool, whether it is or holds a string that is not UTF-8."""
    wrong = np.zeros(len(values), dtype=bool)
    try:
        values.validate(full=True)
    except pa.ArrowInvalid:
        for row, value in enumerate(values):
            try:
                value.as_py()
            except UnicodeDecodeError:
                wrong[row] = True
    return wrong


def decode_json(text: str, position: int = 0) -> tuple[Any, int]:
    """Returns the JSON value that begins at a position, and where it ends; a number with too many digits is infinite.

    Raises:
        ValueError: No value begins there.
        RecursionError: It is nested too deeply.
    """
    try:
        return _JSON.raw_decode(text, position)
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python reads at most 4,300 digits
        return _JSON_OF_LONG_NUMBERS.raw_decode(text, position)


def whole_number(digits: str) -> float:
    """Returns an integer of JSON; infinity where it has more digits than Python reads."""
    try:
        return int(digits)
    except ValueError:
        return math.inf


_JSON, _JSON_OF_LONG_NUMBERS = json.JSONDecoder(), json.JSONDecoder(parse_int=whole_number)
