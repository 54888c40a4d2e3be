"""What Python code reads of a run: each image once, whatever state the run is in, and on any storage."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import smallcap
from smallcap import storage
from smallcap.errors import ConfigError, SchemaError
from smallcap.images.row_ranges import RowRanges
from smallcap.output import reading
from smallcap.output.part_files import PartInfo, PartOptions, write_part
from smallcap.output.schema import CAPTION_COLUMNS, caption_schema
from tests.python_process import run_python

GOLDEN = Path(__file__).parents[2] / "golden" / "run_v1"
SCHEMA = caption_schema("run", "model", "index", pa.schema([("split", pa.string())]))


def write(out: str, name: str, fragment: int, rows: dict[int, str]) -> None:
    """Writes a part of one fragment; `rows` are its rows and their captions, "" for an error."""
    failed = [number for number, caption in rows.items() if not caption]
    written = [
        {"image_id": f"{fragment}-{number}.jpg", "image_uri": f"{fragment}-{number}.jpg", "split": "train"}
        | ({"status": "ok", "caption": caption} if caption else {"status": "error", "error_code": "empty"})
        for number, caption in rows.items()
    ]
    info = PartInfo(
        {fragment: RowRanges.of(np.array(sorted(rows)))},
        {fragment: RowRanges.of(np.array(failed))} if failed else {},
        (),
        len(rows) - len(failed),
        {"empty": len(failed)} if failed else {},
    )
    write_part(out, name, pa.Table.from_pylist(written, schema=SCHEMA), info, SCHEMA, PartOptions(rows_per_row_group=2))


def captions_of(out: str) -> dict[str, str]:
    frame = smallcap.read_captions(out).to_pandas()
    assert frame.image_id.is_unique
    return dict(zip(frame.image_id, frame.caption.fillna(""), strict=True))


def test_a_run_is_a_data_frame_an_arrow_table_and_a_stream(anywhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(anywhere, "part-001-000000.parquet", 0, {0: "a", 1: "b", 2: "", 3: "d"})
    write(anywhere, "part-001-000001.parquet", 1, {0: "e", 1: "f"})
    captions = smallcap.read_captions(anywhere)
    assert len(captions) == 6
    frame = captions.to_pandas()
    assert isinstance(frame, pd.DataFrame)
    assert list(frame.columns) == [*CAPTION_COLUMNS.names, "split"]
    assert list(frame.caption.fillna("")) == ["a", "b", "", "d", "e", "f"]
    table = captions.to_arrow()
    assert table.schema == captions.schema
    assert table["split"].to_pylist() == ["train"] * 6
    monkeypatch.setattr(reading, "_BATCH_ROWS", 3)
    assert [batch.num_rows for batch in captions] == [3, 1, 2]
    assert pa.Table.from_batches(captions) == table
    assert repr(smallcap.read_captions(anywhere, "caption")) == f"Captions of {anywhere}: 6 rows of caption"


def test_columns_and_failed_images_are_chosen(anywhere: str) -> None:
    write(anywhere, "part-001-000000.parquet", 0, {0: "a", 1: "b", 2: ""})
    write(anywhere, "part-001-000001.parquet", 1, {0: "c"})
    chosen = smallcap.read_captions(anywhere, ["split", "image_id"], status="ok")
    assert chosen.to_arrow().column_names == ["split", "image_id"]
    assert chosen.to_arrow()["image_id"].to_pylist() == ["0-0.jpg", "0-1.jpg", "1-0.jpg"]
    failed = smallcap.read_captions(anywhere, ("image_id", "error_code"), status="error")
    assert (len(chosen), len(failed)) == (3, 1)
    assert failed.to_arrow().to_pylist() == [{"image_id": "0-2.jpg", "error_code": "empty"}]
    with pytest.raises(ConfigError, match=r"(?s)no such column.*expected: image_id.*split.*found: captoin"):
        smallcap.read_captions(anywhere, ["image_id", "captoin"])
    with pytest.raises(ConfigError, match="no such status"):
        smallcap.read_captions(anywhere, status="failed")  # type: ignore[arg-type]


def test_unfinished_files_are_not_read(tmp_path: Path) -> None:
    write(str(tmp_path), "part-001-000000.parquet", 0, {0: "a"})
    (tmp_path / ".part-001-000001.parquet.0123").write_bytes(b"half a part")
    (tmp_path / "_embeddings").mkdir()
    (tmp_path / "_embeddings" / "part-001-000001.parquet").write_bytes(b"half a sidecar")
    assert captions_of(str(tmp_path)) == {"0-0.jpg": "a"}


def test_an_image_of_two_parts_is_read_once_before_the_run_has_ended(tmp_path: Path) -> None:
    """A killed driver's worker has written beside the next attempt, and a failed image was tried again."""
    shutil.copytree(GOLDEN / "_work", tmp_path / "_work")
    out = str(tmp_path)
    write(out, "part-001-000000.parquet", 0, {0: "old", 1: "", 2: ""})
    write(out, "part-002-000000.parquet", 0, {0: "new", 1: "new"})
    write(out, "part-003-000000.parquet", 0, {0: "newest", 2: ""})
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.parquet")}
    assert captions_of(out) == {"0-0.jpg": "old", "0-1.jpg": "new", "0-2.jpg": ""}
    assert len(smallcap.read_captions(out)) == 3
    assert smallcap.read_captions(out, "image_id", "ok").to_arrow()["image_id"].to_pylist() == ["0-0.jpg", "0-1.jpg"]
    assert len(smallcap.read_captions(out, status="error")) == 1
    assert files == {path: path.read_bytes() for path in files}  # nothing was settled


def test_a_run_that_has_begun_has_no_rows_and_another_folder_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)no run in this folder.*_run.json"):
        smallcap.read_captions(tmp_path)
    (tmp_path / "_run.json").write_text("{}")
    begun = smallcap.read_captions(tmp_path)
    assert (len(begun), list(begun.to_pandas().columns)) == (0, CAPTION_COLUMNS.names)


def test_a_damaged_part_is_named_with_its_remedy(tmp_path: Path) -> None:
    write(str(tmp_path), "part-001-000000.parquet", 0, {0: "a" * 1000})
    part = tmp_path / "part-001-000000.parquet"
    captions = smallcap.read_captions(tmp_path)
    data = part.read_bytes()
    part.write_bytes(data[:8] + bytes(200) + data[208:])  # the footer is whole
    with pytest.raises(SchemaError, match=f"(?s){part}.*Delete the part"):
        captions.to_pandas()
    part.write_bytes(b"PAR1 and nothing more")
    with pytest.raises(SchemaError, match="Delete the part"):
        smallcap.read_captions(tmp_path)


def test_a_part_that_the_run_has_replaced_meanwhile_is_an_error(tmp_path: Path) -> None:
    write(str(tmp_path), "part-001-000000.parquet", 0, {0: "a"})
    captions = smallcap.read_captions(tmp_path)
    storage.remove(str(tmp_path / "part-001-000000.parquet"))
    with pytest.raises(smallcap.RunError, match="does not exist"):
        captions.to_arrow()


def test_reading_needs_no_model() -> None:
    script = (
        f"import sys, smallcap; print(len(smallcap.read_captions({str(GOLDEN)!r}).to_arrow()), 'torch' in sys.modules)"
    )
    assert run_python(script) == "3 False\n"
