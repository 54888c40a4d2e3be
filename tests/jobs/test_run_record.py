import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.run_record import (
    RunRecord,
    count_images,
    drop_duplicates,
    finished_ids,
    list_parts,
    load_run_record,
    run_lock,
    write_run_record,
)
from smallcap import storage
from smallcap.config import CaptionConfig, load_config
from smallcap.errors import ConfigError, SchemaError
from smallcap.schema import CAPTION_COLUMNS, caption_schema


def config(**changes: object) -> CaptionConfig:
    flags = {"images": ["photos"], "index": "index", "model": "demo", "out": "out", **changes}
    return load_config(CaptionConfig, flags=flags)


def write_part(out: Path, name: str, ids: list[str], error_code: str | None = None) -> None:
    status = "ok" if error_code is None else "error"
    rows = [{"image_id": image_id, "status": status, "error_code": error_code} for image_id in ids]
    table = pa.Table.from_pylist(rows, schema=CAPTION_COLUMNS).cast(caption_schema("run", "model", "index"))
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    storage.write_bytes(str(out / name), buffer.getvalue())


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert load_run_record(str(tmp_path)) is None
    record = RunRecord.new(config(), "demo@1234", "abcd", "demo")
    write_run_record(str(tmp_path), record)
    assert load_run_record(str(tmp_path)) == record
    record.check_same_run(config(), "demo@1234", "out")
    with pytest.raises(ConfigError, match="model weights: demo@1234 → demo@5678"):
        record.check_same_run(config(), "demo@5678", "out")


@pytest.mark.parametrize("text", ["{", "[]", '{"format_version": 1}', '{"format_version": 99}'])
def test_a_malformed_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(SchemaError, match=r"run\.json"):
        load_run_record(str(tmp_path))


def test_counts_and_ids_come_from_the_parts(tmp_path: Path) -> None:
    write_part(tmp_path, "part-000-000000.parquet", ["a", "b"])
    write_part(tmp_path, "part-000-000001.parquet", ["c"], "truncated")
    write_part(tmp_path, "part-001-000000.parquet", ["d"], "not_found")
    assert finished_ids(str(tmp_path)).to_pylist() == ["a", "b", "c", "d"]
    counts = count_images(str(tmp_path))
    assert (counts.total, counts.ok, counts.error) == (4, 2, 2)
    assert counts.errors_by_code == {"not_found": 1, "truncated": 1}


def test_rows_that_two_attempts_wrote_are_kept_once(tmp_path: Path) -> None:
    write_part(tmp_path, "part-000-000000.parquet", ["a", "b"])
    write_part(tmp_path, "part-001-000000.parquet", ["b", "c"])
    write_part(tmp_path, "part-001-000001.parquet", ["a"])
    assert drop_duplicates(str(tmp_path)) == 2
    assert finished_ids(str(tmp_path)).to_pylist() == ["a", "b", "c"]
    assert [Path(part).name for part in list_parts(str(tmp_path))] == [
        "part-000-000000.parquet",
        "part-001-000000.parquet",
    ]
    assert pq.read_schema(tmp_path / "part-001-000000.parquet").metadata[b"smallcap.run_id"] == b"run"
    assert drop_duplicates(str(tmp_path)) == 0


def test_a_damaged_part_is_named_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "part-000-000000.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(SchemaError, match="delete this one"):
        finished_ids(str(tmp_path))


def test_what_is_staged_or_foreign_is_no_part(tmp_path: Path) -> None:
    write_part(tmp_path, ".part-000-000000.parquet.0123", ["a"])
    write_part(tmp_path, "other.parquet", ["b"])
    assert list_parts(str(tmp_path)) == []
    assert list_parts(str(tmp_path / "nothing")) == []


def test_a_second_driver_is_kept_out(tmp_path: Path) -> None:
    with run_lock(str(tmp_path)), pytest.raises(ConfigError, match="Another process"), run_lock(str(tmp_path)):
        pass
    with run_lock(str(tmp_path)):
        pass
