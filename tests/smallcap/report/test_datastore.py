"""What a report says of a datastore is true of its live captions."""

from pathlib import Path

import numpy as np
import pytest

from smallcap.report import datastore
from smallcap.report.datastore import read_datastore, same_words_key
from tests.index_files import PublishIndex, unit_vectors

GOLDEN = Path(__file__).parents[2] / "golden"
TEXTS = ["a dog on the beach", "the beach, and a dog", "A DOG in a beach!", "two dogs", "of the", "and of"]


def test_live_captions_are_measured_and_drawn(
    publish_index: PublishIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datastore, "_BATCH_ROWS", 2)
    images = [["a.jpg"], ["a.jpg", "b.jpg"], None, None, None, None]
    publish_index(str(tmp_path / "index"), unit_vectors(6), TEXTS, images, shards=2, removed=[3])
    store = read_datastore(str(tmp_path / "index"), 4)
    words, characters = store.lengths
    assert (words.count, characters.count) == (5, 5)
    assert words.summary()["mean"] == np.mean([5, 5, 5, 2, 2])
    assert (store.by_source, store.shared, store.with_images) == ({"dump.csv": 5}, 0, 2)
    assert len(store.rows) == 4
    assert all(row["text"] == TEXTS[row["id"]] and row["id"] != 3 for row in store.rows)
    near = store.near_duplicates
    assert (near.compared, near.captions, near.groups) == (5, 3, 1)
    assert near.largest == [(3, TEXTS[:3])]


def test_only_so_many_captions_are_compared(
    publish_index: PublishIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datastore, "_MOST_COMPARED", 2)
    publish_index(str(tmp_path / "index"), unit_vectors(6), TEXTS, shards=3)
    near = read_datastore(str(tmp_path / "index"), 10).near_duplicates
    assert (near.compared, near.captions, near.largest) == (2, 2, [(2, TEXTS[:2])])


@pytest.mark.parametrize("name", ["index_v1", "index_v1_flat"])
def test_an_index_of_version_1_is_read(name: str) -> None:
    store = read_datastore(str(GOLDEN / name / "index"), 2000)
    assert len(store.rows) == store.manifest.ntotal == store.lengths[0].count
    assert sum(store.by_source.values()) >= store.manifest.ntotal


def test_near_equality_is_that_of_content_words() -> None:
    assert same_words_key("A red bus, parked by the road") == same_words_key("the bus parked on a RED road.")
    assert same_words_key("a red bus") != same_words_key("a blue bus")
    assert same_words_key("of the") == ""
