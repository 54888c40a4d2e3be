"""What is left is the input without what the parts hold; what two parts hold comes out of one of them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smallcap.images.fragments import Fragment
from smallcap.images.row_ranges import RowRanges
from smallcap.output import coverage
from smallcap.output.coverage import Coverage, WorkItem, is_settled, qualify_repeated_ids, settle, work_left
from smallcap.output.part_files import PartInfo, PartOptions, list_parts, read_part_infos, write_part
from smallcap.output.schema import CAPTION_COLUMNS, caption_schema

LIST = [Fragment(number, "uris", "list.parquet", number, 4) for number in range(3)]
TAR = Fragment(3, "tar", "a.tar", 0, None)


Rows = dict[int, list[int]]


def info(rows: Rows, failed: Rows | None = None, ends: tuple[int, ...] = ()) -> PartInfo:
    ranges, errors = (
        {number: RowRanges.of(np.array(numbers)) for number, numbers in given.items()} for given in (rows, failed or {})
    )
    failures = sum(map(len, errors.values()))
    ok = sum(map(len, ranges.values())) - failures
    return PartInfo(ranges, errors, ends, ok, {"empty": failures} if failures else {})


def named(*infos: PartInfo) -> list[tuple[str, PartInfo]]:
    return [(f"part-{number}", part) for number, part in enumerate(infos)]


def left(
    parts: list[tuple[str, PartInfo]], limit: int | None = None, retry_failed: bool = False
) -> dict[int, list[int] | None]:
    """Rows left by fragment, None for all of it; the tar turns out to have five."""
    items = work_left([*LIST, TAR], Coverage(parts, retry_failed), limit, lambda fragment, most: min(most, 5))
    return {item.fragment.number: None if item.wanted is None else _first_nine(item.wanted) for item in items}


def _first_nine(rows: RowRanges) -> list[int]:
    """Of a tar that has not been read to its end there are very many."""
    return [row for row in range(16) if rows.contains(np.array([row]))[0]][:9]


def test_what_parts_hold_is_not_left() -> None:
    assert left([]) == {0: None, 1: None, 2: None, 3: None}
    parts = named(info({0: [0, 1, 2, 3], 1: [0, 3]}), info({1: [1]}))
    assert left(parts) == {1: [2], 2: None, 3: None}


def test_a_tar_is_left_until_its_end_is_in_a_part() -> None:
    whole = {number: [0, 1, 2, 3] for number in range(3)}
    assert left(named(info(whole | {3: [0, 1]})))[3] == [2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert left(named(info(whole | {3: [0, 1, 4]}, ends=(3,)))) == {3: [2, 3]}
    assert left(named(info(whole | {3: [0, 1, 4]}, ends=(3,)), info({3: [2, 3]}))) == {}


def test_failed_rows_are_left_where_they_are_tried_again() -> None:
    parts = named(info({0: [0, 1, 2, 3], 1: [0, 1, 2, 3], 2: [0, 1, 2, 3], 3: [0]}, {1: [2], 3: [0]}, ends=(3,)))
    assert left(parts) == {}
    # A tar's last row may stand for what could not be read of it.
    assert left(parts, retry_failed=True) == {1: [2], 3: [0, 1, 2, 3, 4, 5, 6, 7, 8]}


def test_a_limit_counts_from_the_front_and_what_is_done() -> None:
    limits = {3: {0: [0, 1, 2]}, 4: {0: None}, 13: {0: None, 1: None, 2: None, 3: [0]}}
    assert {limit: left([], limit) for limit in limits} == limits
    assert left(named(info({0: [0, 1, 2, 3], 1: [0]})), limit=6) == {1: [1]}


@given(st.lists(st.sets(st.integers(0, 3), min_size=1), max_size=5))
def test_left_and_done_make_the_whole(done: list[set[int]]) -> None:
    coverage_ = Coverage(named(*(info({0: sorted(rows)}) for rows in done)))
    item = coverage_.left(LIST[0])
    missing = set(range(4)) - set().union(*done)
    if item is None:
        assert not missing
    else:
        assert missing == set(range(4) if item.wanted is None else item.wanted.rows().tolist())
    assert coverage_.images == len(set().union(*done))


SCHEMA = caption_schema("run", "model", "index")


def write(
    out: Path, name: str, fragment: int, rows: dict[int, str], ends: bool = False, ids: dict[int, str] | None = None
) -> None:
    """Writes a part of one fragment; `rows` are its rows and their captions, "" for an error."""
    captioned, broken = {"status": "ok", "error_code": None}, {"status": "error", "error_code": "empty"}
    written = [
        {"image_id": (ids or {}).get(row, f"{fragment}-{row}"), "caption": text or None}
        | {"image_uri": f"{fragment}.tar#{row}.jpg"}
        | (captioned if text else broken)
        for row, text in rows.items()
    ]
    table = pa.Table.from_pylist(written, schema=CAPTION_COLUMNS)
    failed = [row for row, text in rows.items() if not text]
    described = info({fragment: list(rows)}, {fragment: failed} if failed else {}, (fragment,) if ends else ())
    write_part(str(out), name, table, described, SCHEMA, PartOptions(rows_per_row_group=10))


def parts_of(out: Path) -> list[tuple[str, PartInfo]]:
    return list(read_part_infos(str(out)))


def captions(out: Path) -> dict[str, str | None]:
    """Captions by id; fails where an id is there twice."""
    rows = [row for uri in list_parts(str(out)) for row in pq.read_table(uri).to_pylist()]
    assert len({row["image_id"] for row in rows}) == len(rows)
    return {row["image_id"]: row["caption"] for row in rows}


def test_of_two_captions_the_older_stays_and_a_caption_before_an_error(tmp_path: Path) -> None:
    write(tmp_path, "part-001-000000.parquet", 0, {0: "old", 1: "", 2: "old", 3: ""}, ends=True)
    write(tmp_path, "part-002-000000.parquet", 0, {0: "new", 1: "new", 2: "", 4: "new"})
    write(tmp_path, "part-003-000000.parquet", 0, {1: "newest", 3: ""})
    assert settle(str(tmp_path), parts_of(tmp_path), LIST) == 5
    assert captions(tmp_path) == {"0-0": "old", "0-1": "new", "0-2": "old", "0-3": None, "0-4": "new"}
    held = [{n: rows.to_json() for n, rows in part.rows.items()} for _, part in parts_of(tmp_path)]
    assert held == [{0: [[0, 1], [2, 3]]}, {0: [[1, 2], [4, 5]]}, {0: [[3, 4]]}]
    assert [part.ends for _, part in parts_of(tmp_path)] == [(), (), ()]
    assert sum(part.ok + sum(part.errors.values()) for _, part in parts_of(tmp_path)) == 5
    assert settle(str(tmp_path), parts_of(tmp_path), LIST) == 0


def test_a_part_may_disappear_while_others_are_compared_with_it(tmp_path: Path) -> None:
    write(tmp_path, "part-001-000000.parquet", 0, {0: "", 1: "old"})
    write(tmp_path, "part-002-000000.parquet", 0, {0: "new"})
    write(tmp_path, "part-003-000000.parquet", 0, {0: "newest"})
    assert not is_settled(parts_of(tmp_path))
    assert settle(str(tmp_path), parts_of(tmp_path), LIST) == 2
    assert captions(tmp_path) == {"0-0": "new", "0-1": "old"}
    assert is_settled(parts_of(tmp_path))


def test_a_part_that_another_one_repeats_disappears(tmp_path: Path) -> None:
    for name in ("part-001-000000.parquet", "part-001-000001.parquet"):
        write(tmp_path, name, 0, {0: "a", 1: "b"}, ends=True)
    assert settle(str(tmp_path), parts_of(tmp_path), LIST) == 2
    assert [uri.rsplit("/", 1)[1] for uri in list_parts(str(tmp_path))] == ["part-001-000000.parquet"]


@pytest.mark.parametrize("hashes_at_once", [1 << 24, 2])
def test_an_id_of_two_tars_is_qualified_in_one_of_them(
    tmp_path: Path, hashes_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coverage, "_HASHES_AT_ONCE", hashes_at_once)
    write(tmp_path, "part-001-000000.parquet", 3, {0: "a", 1: "b"}, ids={0: "x", 1: "y"})
    write(tmp_path, "part-001-000001.parquet", 4, {0: "d", 1: "e"}, ids={0: "y", 1: "z"}, ends=True)
    qualify_repeated_ids(str(tmp_path), parts_of(tmp_path))
    assert captions(tmp_path) == {"x": "a", "y": "b", "4.tar#0.jpg#y": "d", "z": "e"}
    done = Coverage(parts_of(tmp_path))
    assert done.left(Fragment(4, "tar", "b.tar", 0, None)) is None
    item = done.left(TAR)
    assert isinstance(item, WorkItem)
    assert item.wanted is not None
    assert item.wanted.to_json()[0][0] == 2
    before = parts_of(tmp_path)
    qualify_repeated_ids(str(tmp_path), before)
    assert parts_of(tmp_path) == before
    assert sum(part.ok for _, part in before) == 4


def test_an_image_whose_id_was_qualified_still_has_one_row(tmp_path: Path) -> None:
    """The failed row has another id than the caption that came when it was tried again."""
    tar = Fragment(3, "tar", "3.tar", 0, None)
    write(tmp_path, "part-001-000000.parquet", 3, {0: ""}, ids={0: "3.tar#0.jpg#y"})
    write(tmp_path, "part-002-000000.parquet", 3, {0: "d"}, ids={0: "y"})
    assert settle(str(tmp_path), parts_of(tmp_path), [*LIST, tar]) == 1
    assert captions(tmp_path) == {"y": "d"}
