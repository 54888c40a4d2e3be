"""What a line of a table or of JSON is; the shapes of files are tested with their readers."""

import csv
import gzip
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smallcap.errors import SchemaError
from smallcap.tables import json_lines, read_table, text_lines


def rows_of(text: str) -> list[tuple[int, list[str] | str]]:
    return list(read_table(io.BytesIO(f"image,caption\n{text}".encode()), "d.csv", ("caption",)).rows)


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(), st.text()), max_size=20))
def test_what_csv_writes_is_read_back(rows: list[tuple[str, str]]) -> None:
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    assert [fields for _, fields in rows_of(text.getvalue())] == [list(row) for row in rows]


def test_fields_beyond_the_limit() -> None:
    long = "y" * 140_000
    text = f'1,"{"x" * 70_000}\n{"x" * 50_000}"\n2,{long}\n3,"{long}"\n4,"a, b"\n'
    found = [(line, len(fields[1]) if isinstance(fields, list) else None) for line, fields in rows_of(text)]
    assert found == [(2, 120_001), (4, 140_000), (5, None), (6, 4)]


def test_an_error_names_the_line() -> None:
    lines = [b"a" * 30] * 5000
    lines[4321] = b"caf\xe9"
    with pytest.raises(SchemaError) as error:
        list(text_lines(io.BytesIO(b"\n".join(lines)), "d.txt"))
    assert (error.value.where, error.value.found) == ("d.txt: line 4322", "byte 0xe9 in column 4")


@settings(deadline=None)
@given(st.text('{}[]"a1:,. \t\x0b\ufeffe-', max_size=20))
def test_a_line_is_an_object_where_json_says_so(line: str) -> None:
    try:
        expected = json.loads(line)
    except ValueError:
        expected = line
    found = list(json_lines(io.BytesIO(("{}\n" + line).encode()), "d.jsonl"))[1:]
    if line.strip():
        assert found == [(2, expected if isinstance(expected, dict) else line)]
    else:
        assert not found


def test_numbers_without_end_and_nests_without_end_spoil_no_other_line() -> None:
    lines = ['{"id": ' + "9" * 5000 + "}", '{"a":' * 100_000, '{"id": 1}']
    found = [entry for _, entry in json_lines(io.BytesIO(gzip.compress("\n".join(lines).encode())), "d.jsonl.gz")]
    assert found[0] == {"id": float("inf")}
    assert found[1] == lines[1] + "\n"
    assert found[2] == {"id": 1}
