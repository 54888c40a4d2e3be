from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from smallcap import storage
from smallcap.errors import ConfigError, SchemaError
from smallcap.training.feature_store import (
    PartEntry,
    candidate_table,
    feature_table,
    finished_fragments,
    list_parts,
    open_store,
    part_name,
    read_candidates,
    read_features,
    read_queries,
    write_part,
)


def rows(*statuses: str) -> pa.Table:
    failed = [None if status == "ok" else "not_found" for status in statuses]
    return pa.table(
        {
            "image_id": [f"{number}.jpg" for number in range(len(statuses))],
            "image_uri": [f"/data/{number}.jpg" for number in range(len(statuses))],
            "status": list(statuses),
            "error_code": pa.array(failed, pa.string()),
            "error_message": pa.array(failed, pa.string()),
        }
    )


@pytest.fixture
def features() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float16)


def test_a_part_comes_back_bit_by_bit_without_its_errors(anywhere: str, features: np.ndarray) -> None:
    embeddings = np.random.default_rng(1).standard_normal((2, 16)).astype(np.float32)
    table = feature_table(rows("ok", "error", "ok"), [["a dog"], ["lost"], ["a", "b"]], features, embeddings)
    uri = storage.join(anywhere, "train", part_name(0, 0, is_last=True))
    write_part(uri, table)
    read = read_features(uri)
    assert read.image_ids == ["0.jpg", "2.jpg"]
    assert read.captions == [["a dog"], ["a", "b"]]
    assert read.features.tobytes() == features.tobytes()
    queries = read_queries(uri)
    assert (queries.image_ids, queries.captions) == (read.image_ids, read.captions)
    assert queries.embeddings is not None
    assert queries.embeddings.tobytes() == embeddings.tobytes()
    (entry,) = list_parts(anywhere)
    name = "part-000000-00000-last.parquet"
    assert entry == PartEntry(split="train", name=name, images=2, examples=3, errors={"not_found": 1})
    write_part(uri, feature_table(rows("error"), [["lost"]], features[:0], None))
    assert read_features(uri).features.shape == (0, 5, 8)
    assert read_queries(uri).embeddings is None
    assert list_parts(anywhere)[0].examples == 0


def test_candidates_come_back_in_their_order(tmp_path: Path) -> None:
    candidates = [
        [{"caption_id": 7, "text": "near", "score": 0.9}, {"caption_id": 3, "text": "far", "score": 0.1}],
        [],
        [{"caption_id": 1, "text": "only", "score": 0.5}],
    ]
    write_part(str(tmp_path / "part.parquet"), candidate_table(["a", "b", "c"], candidates))
    assert read_candidates(str(tmp_path / "part.parquet")) == [["near", "far"], [], ["only"]]


def test_a_fragment_is_finished_when_all_of_its_batches_are_there(tmp_path: Path, features: np.ndarray) -> None:
    table = feature_table(rows("ok", "ok"), [["a"], ["b"]], features, None)
    batches = [(0, 0), (1, 0), (1, 2), (2, 0), (2, 1), (3, 0)]
    for fragment, batch in batches:
        is_last = (fragment, batch) in [(0, 0), (1, 2), (2, 1)]
        write_part(str(tmp_path / "train" / part_name(fragment, batch, is_last)), table)
    assert finished_fragments(str(tmp_path), "train") == {0, 2}
    assert finished_fragments(str(tmp_path), "validation") == set()


def test_a_store_of_something_else_is_refused_with_the_difference(tmp_path: Path) -> None:
    uri = str(tmp_path / "features.json")
    manifest = open_store(uri, {"inputs": "abc", "preprocessing": {"size_px": 224}})
    assert open_store(uri, manifest.identity) == manifest
    with pytest.raises(ConfigError, match=r"preprocessing.size_px: 224 → 336"):
        open_store(uri, {"inputs": "abc", "preprocessing": {"size_px": 336}})
    Path(uri).write_text('{"format_version": 2, "identity": {}}')
    with pytest.raises(SchemaError, match="cannot read"):
        open_store(uri, {})


def test_other_parquet_is_refused(tmp_path: Path) -> None:
    uri = str(tmp_path / "part.parquet")
    write_part(uri, rows("ok"))
    with pytest.raises(SchemaError, match="not a part of stored features"):
        read_features(uri)
    Path(uri).write_bytes(b"PAR1 is how it begins")
    with pytest.raises(SchemaError, match="cannot be read"):
        read_features(uri)
