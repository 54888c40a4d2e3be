from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smallcap.images import sorting as sorted_images
from smallcap.images.fragments import qualified_id
from smallcap.images.sorting import Duplicates, UnsortedError, checked_order, sort_images, unique_images, without_known

ROWS = st.lists(st.tuples(st.sampled_from("abcdeü😀"), st.sampled_from("xyz")), max_size=40)
PER_TABLE = st.integers(1, 7)


def _tables(rows: list[tuple[str, str]], per_table: int) -> list[pa.Table]:
    schema = pa.schema([("image_id", pa.string()), ("image_uri", pa.string())])
    return [
        pa.table(list(zip(*rows[start : start + per_table], strict=True)), schema=schema)
        for start in range(0, len(rows), per_table)
    ]


def _rows(tables: list[pa.Table]) -> list[tuple[str, str]]:
    return [(row["image_id"], row["image_uri"]) for table in tables for row in table.to_pylist()]


@pytest.fixture
def small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorted_images, "RUN_ROWS", 5)
    monkeypatch.setattr(sorted_images, "BATCH_ROWS", 2)
    monkeypatch.setattr(sorted_images, "_MERGED_ROWS", 6)


@pytest.mark.usefixtures("small_runs")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(ROWS, PER_TABLE)
def test_spilled_runs_merge_to_the_sorted_whole(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], per_table: int
) -> None:
    merged = list(sort_images(_tables(rows, per_table), tmp_path_factory.mktemp("runs")))
    assert _rows(merged) == sorted(rows)


def test_many_runs_are_merged_a_few_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of one step do not grow with the number of runs, though a batch of each would."""
    monkeypatch.setattr(sorted_images, "RUN_ROWS", 50)
    monkeypatch.setattr(sorted_images, "_MERGED_ROWS", 100)
    rows = [(f"{number * 7919 % 5000:04d}", "x") for number in range(5000)]
    lengths: list[int] = []
    sort = sorted_images.sort_table
    monkeypatch.setattr(sorted_images, "sort_table", lambda table: (lengths.append(len(table)), sort(table))[1])
    assert _rows(list(sort_images(_tables(rows, 50), tmp_path))) == sorted(rows)
    runs = len(list(tmp_path.iterdir()))
    assert runs == 100
    assert max(lengths[runs:]) <= 100 + runs


def test_few_images_are_not_spilled(tmp_path: Path) -> None:
    assert _rows(list(sort_images(_tables([("b", "x"), ("a", "x")], 1), tmp_path))) == [("a", "x"), ("b", "x")]
    assert not list(tmp_path.iterdir())


def test_a_run_ends_by_its_bytes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorted_images, "RUN_BYTES", 100)
    rows = [(letter * 30, "x") for letter in "dcba"]
    assert _rows(list(sort_images(_tables(rows, 1), tmp_path))) == sorted(rows)
    assert len(list(tmp_path.iterdir())) > 1


@settings(deadline=None)
@given(ROWS, PER_TABLE)
def test_each_id_is_there_once_with_its_first_uri(rows: list[tuple[str, str]], per_table: int) -> None:
    with TemporaryDirectory() as folder:
        found = Duplicates(Path(folder) / "aside.arrow")
        unique = _rows(list(unique_images(_tables(sorted(rows), per_table), found)))
        aside = _rows(list(found.rows_aside()))
    first: dict[str, str] = {}
    for image_id, uri in sorted(rows):
        first.setdefault(image_id, uri)
    assert dict(unique) == first
    assert len(unique) == len(first)
    others = {(image_id, uri) for image_id, uri in rows if uri != first[image_id]}
    assert sorted(aside) == sorted((qualified_id(image_id, uri), uri) for image_id, uri in others)
    assert found.count == len(rows) - len(first) - len(others)
    assert found.aside == len(others)
    examples = sorted((image_id, first[image_id], uri) for image_id, uri in others)
    assert [(e.image_id, e.taken, e.left_out) for e in found.examples] == examples[:5]


@settings(deadline=None)
@given(ROWS, ROWS, PER_TABLE, PER_TABLE, st.booleans())
def test_known_images_are_left_out_and_others_with_their_ids_set_aside(
    rows: list[tuple[str, str]], known: list[tuple[str, str]], per_table: int, per_chunk: int, repeats: bool
) -> None:
    ids = dict(known)
    chunks = _tables(sorted(ids.items()), per_chunk)
    with TemporaryDirectory() as folder:
        found = Duplicates(Path(folder) / "aside.arrow")
        left = _rows(list(without_known(_tables(sorted(rows), per_table), chunks, found, repeats=repeats)))
        aside = _rows(list(found.rows_aside()))
    assert left == [row for row in sorted(rows) if row[0] not in ids]
    others = [(image_id, uri) for image_id, uri in sorted(rows) if ids.get(image_id, uri) != uri]
    assert aside == [(qualified_id(image_id, uri), uri) for image_id, uri in others]
    assert found.count == (len(rows) - len(left) - len(others) if repeats else 0)


@settings(deadline=None)
@given(ROWS, PER_TABLE)
def test_order_is_checked_within_and_between_tables(rows: list[tuple[str, str]], per_table: int) -> None:
    assert _rows(list(checked_order(_tables(sorted(rows), per_table)))) == sorted(rows)
    if rows != sorted(rows):
        with pytest.raises(UnsortedError):
            list(checked_order(_tables(rows, per_table)))
