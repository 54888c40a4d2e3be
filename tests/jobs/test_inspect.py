"""Golden files of the first formats, opened for ever."""

from pathlib import Path

import duckdb
import pandas as pd
import pytest

from jobs.captioning.record import load_run_record, read_parts
from jobs.inspect import inspect_path
from smallcap.errors import ConfigError

GOLDEN = Path(__file__).parents[1] / "golden"
RUNS = {1: str(GOLDEN / "run_v1"), 2: str(GOLDEN / "run_v2"), 3: str(GOLDEN / "run_json_v4")}


@pytest.mark.parametrize("version", RUNS)
def test_a_run_of_each_version_is_read(version: int) -> None:
    run = RUNS[version]
    record = load_run_record(run)
    assert record is not None
    assert (record.status, record.schema_version) == ("complete", version)
    ids = [image_id for _, table in read_parts(run, ["image_id"]) for image_id in table["image_id"].to_pylist()]
    assert ids == ["10000000.jpg", "10000001.jpg", "broken.jpg"]
    assert record.images.errors_by_code == {"not_an_image": 1}
    facts = inspect_path(run, samples=2)
    alternatives = [sample["alternatives"] for sample in facts["samples"]]
    assert alternatives == [None, None] if version == 1 else all(len(others) == 1 for others in alternatives)
    assert (facts["kind"], facts["parts"], len(facts["samples"])) == ("run", 1, 2)
    assert facts["samples"][0]["caption"]
    assert len(facts["samples"][0]["neighbours"]) == 4


@pytest.mark.parametrize("version", RUNS)
def test_parts_are_read_by_pandas_and_duckdb(version: int) -> None:
    part = str(next(Path(RUNS[version]).glob("part-*.parquet")))
    frame = pd.read_parquet(part)
    assert list(frame.status) == ["ok", "ok", "error"]
    query = f"select image_id, neighbours[1].text, clip_score from '{part}' where status = 'ok' order by image_id"
    rows = duckdb.sql(query).fetchall()
    assert [row[0] for row in rows] == ["10000000.jpg", "10000001.jpg"]
    assert all(nearest and -1 <= score <= 1 for _, nearest, score in rows)


def test_an_index_of_version_1_is_inspected() -> None:
    facts = inspect_path(str(GOLDEN / "index_v1" / "index"), samples=3)
    assert (facts["kind"], facts["ntotal"], facts["shards"]) == ("index", 32, 2)
    assert len(facts["samples"]) == 3


def test_another_folder_is_neither(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither an index nor a run"):
        inspect_path(str(tmp_path), samples=1)
