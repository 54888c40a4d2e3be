"""Failed images are rows that can be tried again; what is no image's fault stops a run; two drivers do not mix."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from caption_runs import config_for, jpeg, read_rows, write_images
from typer.testing import CliRunner

from jobs import caption
from jobs.cli import app
from jobs.part_sink import describe_part
from jobs.run_record import Attempt, check_attempt, load_run_record, write_run_record
from smallcap import storage
from smallcap.errors import ConfigError, ConflictError, StorageError
from smallcap.part_files import list_parts

pytestmark = pytest.mark.ray


def test_failed_images_are_tried_again_and_others_are_not(s3: str, index: str, tiny_smallcap: Path) -> None:
    images, out = f"{s3}/images", f"{s3}/out"
    write_images(images, 8)
    for name in ("a.jpg", "b.jpg"):
        storage.write_bytes(storage.join(images, name), b"no image yet")
    config = config_for(images, index, tiny_smallcap, out, "output.rows_per_part=4", "output.save_embeddings=true")
    caption.run(config)
    before = read_rows(out)
    assert caption.run(config).new_images == 0
    storage.write_bytes(storage.join(images, "a.jpg"), jpeg(100))
    storage.remove(storage.join(images, "b.jpg"))
    summary = caption.run(config, retry_failed=True)
    assert summary.new_images == 2
    rows = read_rows(out)
    assert list(rows.image_id) == list(before.image_id)
    assert rows.loc["a.jpg"].status == "ok"
    assert rows.loc["b.jpg"].error_code == "not_found"
    assert summary.images.errors_by_code == {"not_found": 1}
    good = before[before.status == "ok"]
    assert list(rows.loc[good.index].caption) == list(good.caption)
    sidecars = storage.list_folder(storage.join(out, "_embeddings"))
    assert [uri.rsplit("/", 1)[1] for uri in sidecars] == [uri.rsplit("/", 1)[1] for uri in list_parts(out)]


def test_the_command_line_retries_by_the_folder_alone_and_exits_by_the_error_rate(
    tmp_path: Path, index: str, tiny_smallcap: Path
) -> None:
    images, out = str(tmp_path / "images"), str(tmp_path / "out")
    write_images(images, 3)
    (tmp_path / "images" / "bad.jpg").write_bytes(b"no image")
    arguments = ["caption", images, "--index", index, "--model", str(tiny_smallcap), "--out", out]
    arguments += ["--batch-size", "4", "--dtype", "float32"]
    assert CliRunner().invoke(app, [*arguments, "--max-error-rate", "0.25"]).exit_code == 0
    failed = CliRunner().invoke(app, [*arguments, "--max-error-rate", "0.2"])
    assert failed.exit_code == 3
    assert "1 not_an_image" in failed.output
    (tmp_path / "images" / "bad.jpg").write_bytes(jpeg(9))
    again = CliRunner().invoke(app, ["caption", "--retry-failed", out])
    assert again.exit_code == 0, again.output
    assert set(read_rows(out).status) == {"ok"}
    nothing = CliRunner().invoke(app, ["caption", "--retry-failed", str(tmp_path / "nothing")])
    assert isinstance(nothing.exception, ConfigError)


def test_a_part_of_an_attempt_that_was_overtaken_is_not_written(
    tmp_path: Path, index: str, tiny_smallcap: Path
) -> None:
    images, out = str(tmp_path / "images"), str(tmp_path / "out")
    write_images(images, 2)
    caption.run(config_for(images, index, tiny_smallcap, out))
    record = load_run_record(out)
    assert record is not None
    mine = record.attempts[-1]
    check_attempt(out, mine)
    later = Attempt(token="another", started_at="2026-01-01T00:00:00+00:00")
    write_run_record(out, record.model_copy(update={"attempts": (*record.attempts, later)}))
    with pytest.raises(ConflictError, match="started this run again"):
        check_attempt(out, mine)


def test_rows_that_an_orphaned_worker_wrote_again_are_taken_out(
    tmp_path: Path, index: str, tiny_smallcap: Path
) -> None:
    images, out = str(tmp_path / "images"), tmp_path / "out"
    write_images(images, 9)
    config = config_for(images, index, tiny_smallcap, str(out), "output.rows_per_part=4", "compute.batch_size=4")
    caption.run(config)
    whole = read_rows(str(out))
    part = Path(list_parts(str(out))[0])
    (out / "part-001-000099.parquet").write_bytes(part.read_bytes())
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"status": "running"}))
    summary = caption.run(config)
    assert summary.new_images == 0
    assert list(read_rows(str(out)).image_id) == list(whole.image_id)
    assert summary.images.total == 9


def test_an_unwritable_output_stops_the_run(tmp_path: Path, index: str, tiny_smallcap: Path) -> None:
    images, out = str(tmp_path / "images"), tmp_path / "out"
    write_images(images, 2)
    out.write_text("a file, where a folder should be")
    with pytest.raises(StorageError):
        caption.run(config_for(images, index, tiny_smallcap, str(out)))


def test_a_part_says_which_rows_it_holds() -> None:
    table = pa.table(
        {
            "image_id": ["x", "y", "z", "x"],
            "fragment": pa.array([3, 3, 4, 4], pa.int32()),
            "fragment_row": pa.array([7, 5, 0, 1], pa.int32()),
            "ends_fragment": [True, False, False, False],
            "status": ["ok", "error", "ok", "ok"],
            "error_code": [None, "empty", None, None],
        }
    )
    info = describe_part(table)
    assert {number: rows.to_json() for number, rows in info.rows.items()} == {3: [[5, 6], [7, 8]], 4: [[0, 2]]}
    assert {number: rows.to_json() for number, rows in info.failed.items()} == {3: [[5, 6]]}
    assert (info.ends, info.ok, info.errors) == ((3,), 2, {"empty": 1})
