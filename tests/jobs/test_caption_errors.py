"""Failed images are rows that can be tried again; what no image causes stops a run; two drivers do not mix."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from jobs import caption
from jobs.captioning.record import Attempt, check_attempt, load_run_record, write_run_record
from jobs.captioning.write import describe_part
from jobs.cli import app
from smallcap import storage
from smallcap.config import CaptionConfig
from smallcap.errors import ConfigError, ConflictError, StorageError
from smallcap.output.part_files import PartInfo, list_parts
from smallcap.output.schema import ENDS_FRAGMENT, FRAGMENT, FRAGMENT_ROW, LEFT_OUT
from tests.caption_runs import config_for, jpeg, read_rows, write_images


def test_failed_images_end_by_the_error_rate_and_are_tried_again_by_the_folder_alone(
    s3: str, index: str, tiny_smallcap: Path
) -> None:
    images, out = f"{s3}/images", f"{s3}/out"
    write_images(images, 8)
    for name in ("a.jpg", "b.jpg"):
        storage.write_bytes(storage.join(images, name), b"no image yet")
    sets = ("output.rows_per_part=4", "output.save_embeddings=true", "compute.batch_size=8", "compute.dtype=float32")
    arguments = ["caption", images, "--index", index, "--model", str(tiny_smallcap), "--out", out]
    arguments += [argument for name in sets for argument in ("--set", name)]
    assert CliRunner().invoke(app, [*arguments, "--max-error-rate", "0.25"]).exit_code == 0
    before = read_rows(out)
    failed = CliRunner().invoke(app, [*arguments, "--max-error-rate", "0.15"])
    assert failed.exit_code == 3
    assert "2 not_an_image" in failed.output
    storage.write_bytes(storage.join(images, "a.jpg"), jpeg(100))
    storage.remove(storage.join(images, "b.jpg"))
    again = CliRunner().invoke(app, ["caption", "--retry-failed", out])
    assert again.exit_code == 0, again.output
    assert "Captioned 2 images" in again.output
    rows = read_rows(out)
    assert list(rows.image_id) == list(before.image_id)
    assert rows.loc["a.jpg"].status == "ok"
    assert rows.loc["b.jpg"].error_code == "not_found"
    assert list(rows.error_code.dropna()) == ["not_found"]
    good = before[before.status == "ok"]
    assert list(rows.loc[good.index].caption) == list(good.caption)
    sidecars = storage.list_folder(storage.join(out, "_embeddings"))
    assert [uri.rsplit("/", 1)[1] for uri in sidecars] == [uri.rsplit("/", 1)[1] for uri in list_parts(out)]
    nothing = CliRunner().invoke(app, ["caption", "--retry-failed", storage.join(s3, "nothing")])
    assert isinstance(nothing.exception, ConfigError)


def test_a_part_of_an_attempt_that_was_overtaken_is_not_written(tmp_path: Path, finished_run: CaptionConfig) -> None:
    out = str(tmp_path / "out")
    shutil.copytree(finished_run.out, out)
    record = load_run_record(out)
    assert record is not None
    mine = record.attempts[-1]
    check_attempt(out, mine)
    later = Attempt(token="another", started_at="2026-01-01T00:00:00+00:00")
    write_run_record(out, record.model_copy(update={"attempts": (*record.attempts, later)}))
    with pytest.raises(ConflictError, match="started this run again"):
        check_attempt(out, mine)


def test_rows_that_an_orphaned_worker_wrote_again_are_taken_out(tmp_path: Path, finished_run: CaptionConfig) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished_run.out, out)
    whole = read_rows(str(out))
    part = Path(list_parts(str(out))[0])
    (out / "part-001-000099.parquet").write_bytes(part.read_bytes())
    record = json.loads((out / "_run.json").read_text())
    (out / "_run.json").write_text(json.dumps(record | {"status": "running"}))
    summary = caption.run(finished_run.model_copy(update={"out": str(out)}))
    assert summary.new_images == 0
    assert list(read_rows(str(out)).image_id) == list(whole.image_id)
    assert summary.images.total == 9


def test_an_unwritable_output_stops_the_run(tmp_path: Path, index: str, tiny_smallcap: Path) -> None:
    images, out = str(tmp_path / "images"), tmp_path / "out"
    write_images(images, 2)
    out.write_text("a file, where a folder should be")
    with pytest.raises(StorageError):
        caption.run(config_for(images, index, tiny_smallcap, str(out)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [("compute.num_actors=64", "at most 8 on 4 CPUs"), ("compute.device=cuda", "No node of the cluster has a GPU")],
)
def test_what_the_cluster_cannot_hold_is_refused_and_leaves_nothing(
    wrong: str, message: str, tmp_path: Path, index: str, tiny_smallcap: Path
) -> None:
    write_images(f"{tmp_path}/images", 2)
    with pytest.raises(ConfigError, match=message):
        caption.run(config_for(f"{tmp_path}/images", index, tiny_smallcap, f"{tmp_path}/new/out", wrong))
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_a_part_says_which_rows_it_holds() -> None:
    table = pa.table(
        {
            "image_id": ["x", "y", "z", "x"],
            FRAGMENT: pa.array([3, 3, 4, 4], pa.int32()),
            FRAGMENT_ROW: pa.array([7, 5, 0, 1], pa.int32()),
            ENDS_FRAGMENT: [True, False, False, False],
            LEFT_OUT: [[1, 2], None, None, None],
            "status": ["ok", "error", "ok", "ok"],
            "error_code": [None, "empty", None, None],
        }
    )
    info = describe_part(table)
    assert {number: rows.to_json() for number, rows in info.rows.items()} == {3: [[5, 6], [7, 8]], 4: [[0, 2]]}
    assert {number: rows.to_json() for number, rows in info.failed.items()} == {3: [[5, 6]]}
    assert (info.ends, info.ok, info.errors) == ((3,), 3, {"empty": 1})
    assert info.left_out == {3: (1, 2)}
    assert PartInfo.from_json(info.to_json()) == info
