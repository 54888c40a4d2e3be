"""A golden run and golden indexes of format version 1, opened forever."""

from pathlib import Path

import duckdb
import pandas as pd
import pytest

from jobs.captioning.record import load_run_record, read_parts
from jobs.inspect import inspect_path
from smallcap.errors import ConfigError
from smallcap.images.work_list import load_work_list
from smallcap.output.coverage import Coverage
from smallcap.output.part_files import read_part_infos

GOLDEN = Path(__file__).parents[1] / "golden"
RUN = str(GOLDEN / "run_v1")
IDS = ["10000000.jpg", "10000001.jpg", "broken.jpg"]


def test_a_run_of_version_1_is_read() -> None:
    record = load_run_record(RUN)
    assert record is not None
    assert (record.format_version, record.status, record.run_id) == (1, "complete", "9156e9610be6")
    assert record.images.errors_by_code == {"not_an_image": 1}
    assert record.attempts[0].search_backends == ("cpu",)
    ids = [image_id for _, table in read_parts(RUN, ["image_id"]) for image_id in table["image_id"].to_pylist()]
    assert ids == IDS
    facts = inspect_path(RUN, samples=2)
    assert (facts["kind"], facts["parts"], len(facts["samples"])) == ("run", 1, 2)
    assert all(len(sample["alternatives"]) == 1 for sample in facts["samples"])
    assert facts["samples"][0]["caption"]
    assert len(facts["samples"][0]["neighbours"]) == 4


def test_nothing_is_left_of_a_run_of_version_1() -> None:
    work = load_work_list(RUN)
    assert work is not None
    assert (work.images, work.sources) == (3, ("images.parquet",))
    parts = list(read_part_infos(RUN))
    assert [Coverage(parts).left(fragment) for fragment in work.fragments] == [None]
    item = Coverage(parts, retry_failed=True).left(work.fragments[0])
    assert item is not None
    assert item.wanted is not None
    assert item.wanted.to_json() == [[2, 3]]


def test_parts_are_read_by_pandas_and_duckdb() -> None:
    part = str(next(Path(RUN).glob("part-*.parquet")))
    frame = pd.read_parquet(part)
    assert list(frame.status) == ["ok", "ok", "error"]
    query = f"select image_id, neighbours[1].text, clip_score from '{part}' where status = 'ok' order by image_id"
    rows = duckdb.sql(query).fetchall()
    assert [row[0] for row in rows] == IDS[:2]
    assert all(nearest and -1 <= score <= 1 for _, nearest, score in rows)


@pytest.mark.parametrize(("name", "rows", "shards"), [("index_v1", 52, 3), ("index_v1_flat", 32, 2)])
def test_an_index_of_version_1_is_inspected(name: str, rows: int, shards: int) -> None:
    facts = inspect_path(str(GOLDEN / name / "index"), samples=3)
    assert (facts["kind"], facts["ntotal"], facts["shards"]) == ("index", rows, shards)
    assert len(facts["samples"]) == 3


def test_another_folder_is_neither(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither an index nor a run"):
        inspect_path(str(tmp_path), samples=1)
