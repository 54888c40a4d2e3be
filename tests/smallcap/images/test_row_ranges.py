import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smallcap.errors import SchemaError
from smallcap.images.row_ranges import RowRanges

ROWS = st.lists(st.integers(0, 60), max_size=40)
SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=8)


def _set(ranges: RowRanges) -> set[int]:
    return {row for first, stop in ranges.to_json() for row in range(first, stop)}


@given(ROWS)
def test_holds_the_rows_it_was_made_of(rows: list[int]) -> None:
    ranges = RowRanges.of(np.array(rows, dtype=np.int64))
    assert _set(ranges) == set(rows)
    assert ranges.rows().tolist() == sorted(set(rows))
    assert len(ranges) == len(set(rows))
    assert bool(ranges) == bool(rows)
    bounds = [bound for pair in ranges.to_json() for bound in pair]
    assert bounds == sorted(set(bounds))  # sorted and apart
    assert RowRanges.from_json(json.loads(json.dumps(ranges.to_json()))) == ranges
    assert pickle.loads(pickle.dumps(ranges)) == ranges


@given(SPANS)
def test_overlapping_and_empty_ranges_are_joined(spans: list[tuple[int, int]]) -> None:
    rows = {row for first, stop in spans for row in range(first, stop)}
    assert RowRanges(spans) == RowRanges.of(np.array(sorted(rows), dtype=np.int64))


@given(ROWS, ROWS)
def test_behaves_as_a_set(left: list[int], right: list[int]) -> None:
    a, b = RowRanges.of(np.array(left, dtype=np.int64)), RowRanges.of(np.array(right, dtype=np.int64))
    assert _set(a.union(b)) == set(left) | set(right)
    assert _set(a.subtract(b)) == set(left) - set(right)
    assert _set(a.common(b)) == set(left) & set(right)
    assert a.contains(np.arange(62)).tolist() == [row in set(left) for row in range(62)]
    assert (a == b) == (set(left) == set(right))
    if a == b:
        assert hash(a) == hash(b)


def test_a_span_is_half_open_and_cannot_be_changed() -> None:
    assert not RowRanges.span(3, 3)
    ranges = RowRanges.span(3, 5)
    assert ranges.rows().tolist() == [3, 4]
    with pytest.raises(AttributeError):
        ranges._ranges = np.zeros((0, 2))
    with pytest.raises(ValueError, match="read-only"):
        ranges.ranges[0, 0] = 7


@pytest.mark.parametrize("value", [[[1, 2, 3]], [1, 2], "x", [["a", "b"]], [[1], [2, 3]], None])
def test_bad_json_is_a_schema_error(value: object) -> None:
    with pytest.raises(SchemaError, match="Ranges of rows"):
        RowRanges.from_json(value)
