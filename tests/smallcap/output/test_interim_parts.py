"""Interim parts count until their full part is there, and whatever is interrupted, each row counts once."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smallcap import storage
from smallcap.errors import SchemaError
from smallcap.images.row_ranges import RowRanges
from smallcap.output.interim_parts import join_interim_parts, remove_replaced
from smallcap.output.part_files import (
    PartInfo,
    PartOptions,
    full_name,
    list_parts,
    part_name,
    read_part_infos,
    remove_orphans,
    write_part,
)
from smallcap.output.schema import CAPTION_COLUMNS, PLACE_COLUMNS, caption_schema
from tests.caption_runs import Killed, killed_at, read_rows

SCHEMA = caption_schema("run", "model", "index")
SIDECARS = PartOptions(rows_per_row_group=2, embeddings=True, webdataset=True)
FULL, FIRST, SECOND = (part_name(1, 0, interim) for interim in (None, 0, 1))
OTHER = part_name(2, 0)


def row(image_id: str, error: str | None = None) -> dict[str, Any]:
    if error:
        return {"image_id": image_id, "image_uri": image_id, "status": "error", "error_code": error}
    captioned = {"caption": f"a photo of {image_id}", "embedding": [0.5, 0.5], "image_bytes": b"\xff\xd8\xff " * 9}
    return {"image_id": image_id, "image_uri": image_id, "status": "ok", "caption_tokens": 5, **captioned}


def write(out: str, name: str, rows: list[dict[str, Any]], info: PartInfo) -> None:
    fields = [pa.field("image_bytes", pa.binary()), pa.field("embedding", pa.list_(pa.float32(), 2))]
    places = [pa.field(name, pa.int32()) for name in PLACE_COLUMNS]
    placed = [one | dict.fromkeys(PLACE_COLUMNS, 3) for one in rows]
    table = pa.Table.from_pylist(placed, schema=pa.schema([*SCHEMA, *fields, *places]))
    write_part(out, name, table, info, SCHEMA, SIDECARS)


def span(first: int, stop: int) -> dict[int, RowRanges]:
    return {3: RowRanges.span(first, stop)}


@pytest.fixture
def out(anywhere: str) -> str:
    """An output with two interim parts of one full part, which an attempt has left, and a part of another attempt."""
    write(anywhere, FIRST, [row("d.jpg"), row("a.b.jpg")], PartInfo(span(0, 2), ok=2))
    errors = {"empty": 1}
    info = PartInfo(span(2, 5), {3: RowRanges.span(4, 5)}, (3,), 2, errors)
    write(anywhere, SECOND, [row("c.jpg"), row("a_b.png"), row("e.jpg", "empty")], info)
    write(anywhere, OTHER, [row("f.jpg")], PartInfo({4: RowRanges.span(0, 1)}, ok=1))
    return anywhere


def names(out: str) -> list[str]:
    return [uri.rsplit("/", 1)[-1] for uri in list_parts(out)]


def ids_of(out: str) -> list[str]:
    """The ids in the parts that count."""
    return list(read_rows(out).image_id)


ALL = ["a.b.jpg", "a_b.png", "c.jpg", "d.jpg", "e.jpg", "f.jpg"]


def test_names_tell_interim_parts() -> None:
    assert (FULL, FIRST) == ("part-001-000000.parquet", "part-001-000000-0000.parquet")
    assert (full_name(FIRST), full_name(FULL), full_name("_run.json")) == (FULL, None, None)


def test_interim_parts_are_joined_with_their_sidecars(out: str) -> None:
    assert names(out) == [FIRST, SECOND, OTHER]
    join_interim_parts(out, list(read_part_infos(out)), 2)
    assert names(out) == [FULL, OTHER]
    data = storage.read_bytes(storage.join(out, FULL))
    table, metadata = pq.read_table(io.BytesIO(data)), pq.read_metadata(io.BytesIO(data))
    assert table["image_id"].to_pylist() == ["a.b.jpg", "a_b.png", "c.jpg", "d.jpg", "e.jpg"]
    assert table.schema.names == CAPTION_COLUMNS.names
    assert [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)] == [2, 2, 1]
    info = PartInfo(span(0, 5), {3: RowRanges.span(4, 5)}, (3,), 4, {"empty": 1})
    assert dict(read_part_infos(out))[FULL] == info
    embeddings = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(out, "_embeddings", FULL))))
    assert embeddings["image_id"].to_pylist() == ["a.b.jpg", "a_b.png", "c.jpg", "d.jpg"]
    tar_uri = storage.join(out, "_webdataset", "part-001-000000.tar")
    with storage.open_ranged(tar_uri) as file, tarfile.open(fileobj=file) as tar:
        assert tar.getnames()[::3] == ["a_b.jpg", "a_b-2.jpg", "c.jpg", "d.jpg"]  # two ids have one key
        assert tar.extractfile("a_b-2.txt").read() == b"a photo of a_b.png"  # type: ignore[union-attr]
    assert remove_orphans(out) == []
    join_interim_parts(out, list(read_part_infos(out)), 2)
    assert names(out) == [FULL, OTHER]


def test_an_interim_part_does_not_count_beside_its_full_part(out: str) -> None:
    rows = [row("d.jpg"), row("a.b.jpg"), row("c.jpg"), row("a_b.png"), row("e.jpg", "empty")]
    write(out, FULL, rows, PartInfo(span(0, 5), ok=4, errors={"empty": 1}))
    assert names(out) == [FULL, OTHER]
    assert ids_of(out) == ALL
    remove_replaced(out)
    files = {
        uri.rsplit("/", 1)[-1]
        for folder in ("", "_embeddings", "_webdataset")
        for uri in storage.list_files(storage.join(out, folder))
    }
    assert files == {FULL, OTHER, "part-001-000000.tar", "part-002-000000.tar"}


@pytest.mark.parametrize("step", range(10))
def test_a_join_that_is_killed_is_done_again(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = str(tmp_path)
    write(out, FIRST, [row("a.jpg")], PartInfo(span(0, 1), ok=1))
    write(out, SECOND, [row("b.jpg")], PartInfo(span(1, 2), ok=1))
    with killed_at(step, monkeypatch) as changes:
        try:
            join_interim_parts(out, list(read_part_infos(out)), 2)
            assert len(changes) == 9  # two sidecars, the part, and the removal of two parts with two sidecars each
        except Killed:
            pass
    assert ids_of(out) == ["a.jpg", "b.jpg"]
    assert PartInfo.joined([info for _, info in read_part_infos(out)]).rows == span(0, 2)
    remove_replaced(out)
    join_interim_parts(out, list(read_part_infos(out)), 2)
    remove_orphans(out)
    assert names(out) == [FULL]
    assert ids_of(out) == ["a.jpg", "b.jpg"]
    found = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert found == [FULL, FULL, "part-001-000000.tar"]


def test_a_damaged_interim_part_is_named(tmp_path: Path) -> None:
    write(str(tmp_path), FIRST, [row("a.jpg")], PartInfo(span(0, 1), ok=1))
    parts = list(read_part_infos(str(tmp_path)))
    (tmp_path / FIRST).write_bytes(b"PAR1")
    with pytest.raises(SchemaError, match=f"(?s){FIRST}.*Delete the part"):
        join_interim_parts(str(tmp_path), parts, 2)
