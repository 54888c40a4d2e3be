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
    if isinstance(value, float | np.floating) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else str(value)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def id_strings(values: pa.Array) -> pa.Array:
    """Returns a column of ids as strings, null where there is none; lists, images and captions have this one rule.

    A whole number is written without a point: integers become floats where a column has nulls (pandas). A struct is an
    image of Hugging Face, whose path is its id.

    Raises:
        pa.ArrowException: Values of this type are not ids.
    """
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if holds_path(values.type):
        values = pc.struct_field(values, "path")
    if pa.types.is_floating(values.type):
        return pa.array(map(id_text, values.to_numpy(zero_copy_only=False)), pa.string())
    return values.cast(pa.string())


def holds_path(kind: pa.DataType) -> bool:
    """Says whether a type is a struct with a path, as Hugging Face's images are."""
    return pa.types.is_struct(kind) and kind.get_field_index("path") >= 0


def is_text(value: str) -> bool:
    """Says whether a string is text: it has neither control codes, other than blanks, nor half a surrogate pair."""
    return value.isprintable() or not _NO_TEXT.search(value)


def no_text(strings: pa.Array) -> np.ndarray:
    """Says of each string of a column, [n] bool, whether it is not text; see `is_text`. A null is none of these."""
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


def parse_json(text: str | bytes) -> Any:
    """Returns the value of a whole JSON text; a number with too many digits is infinite.

    Raises:
        ValueError: It is not JSON.
        RecursionError: It is nested too deeply.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python reads at most 4,300 digits
        return json.loads(text, parse_int=_whole_number)


def json_fields(text: str | None) -> dict[str, Any]:
    """Returns the fields of a JSON object; none where the text is missing, cannot be read, or is not an object."""
    try:
        fields = parse_json(text or "null")
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _whole_number(digits: str) -> float:
    try:
        return int(digits)
    except ValueError:
        return math.inf


_JSON, _JSON_OF_LONG_NUMBERS = json.JSONDecoder(), json.JSONDecoder(parse_int=_whole_number)
