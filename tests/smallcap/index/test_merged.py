"""Several indexes against a plain loop over all their captions."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smallcap.errors import ConfigError, RunError
from smallcap.index.manifest import EncoderIdentity, load_manifests, split_index_ids
from smallcap.index.merged import MergedSearch, find_nearest, open_indexes
from smallcap.index.retriever import Neighbour, Retriever
from smallcap.retrieval_config import name_indexes
from tests.index_files import PublishIndex, unit_vectors

DIM = 16
QUERIES = unit_vectors(7, DIM, seed=9)
VECTORS = unit_vectors(60, DIM, seed=1)
# The second index has ten captions of the first one, three of them in other letters, and the third is very small.
TEXTS = [f"a dog {number} on a road" for number in range(60)]
SECOND = [*TEXTS[20:27], *(text.upper() for text in TEXTS[27:30]), *TEXTS[40:55]]
MEMBERS = {
    "news": (TEXTS[:30], VECTORS[:30]),
    "shop": (SECOND, np.concatenate([VECTORS[20:30], VECTORS[40:55]])),
    "few": (TEXTS[58:], VECTORS[58:]),
}
WEIGHTS = {"news": 0.7, "shop": 1.1, "few": 1.0}


@pytest.fixture
def published(tmp_path: Path, publish_index: PublishIndex) -> list[str]:
    for name, (texts, vectors) in MEMBERS.items():
        images = [[f"{text}.jpg"] for text in texts]
        publish_index(f"{tmp_path}/{name}", vectors, texts, images, shards=2 if name == "news" else 1)
    return [f"{tmp_path}/{name}" for name in MEMBERS]


@pytest.fixture
def merged(published: list[str], cache: str) -> MergedSearch:
    indexes = name_indexes(published, weights=list(WEIGHTS.values()))
    opened = open_indexes(indexes, load_manifests(published), cache)
    assert isinstance(opened, MergedSearch)
    return opened


def expected(query: np.ndarray, k: int, searched: Sequence[str], own: str | None = None) -> list[Neighbour]:
    """The readable reference: each caption once, where it scores best by its index's weight."""
    found: dict[str, list[tuple[float, int, int, Neighbour]]] = {}
    for place, name in enumerate(searched):
        texts, vectors = MEMBERS[name]
        scores = (vectors.astype(np.float64) @ query.astype(np.float64)).astype(np.float32)
        allowed = [row for row, text in enumerate(texts) if f"{text}.jpg" != own]
        best = sorted(allowed, key=lambda row: (-scores[row], row))[:k]  # what this index alone retrieves
        for row in best:
            neighbour = Neighbour(row, texts[row], float(scores[row]), (f"{name}/dump.csv",))
            key = unicodedata.normalize("NFKC", texts[row]).casefold()
            found.setdefault(key, []).append((-float(scores[row]) * WEIGHTS[name], place, row, neighbour))
    merged = []
    for places in found.values():
        places.sort(key=lambda entry: entry[:3])
        best_one = places[0][3]
        sources = tuple(source for *_, one in places for source in one.sources)
        merged.append((*places[0][:3], Neighbour(best_one.caption_id, best_one.text, best_one.score, sources)))
    return [one for *_, one in sorted(merged, key=lambda entry: entry[:3])[:k]]


def near(found: list[Neighbour]) -> list[Any]:
    return [(one.caption_id, one.text, pytest.approx(one.score, abs=1e-6), one.sources) for one in found]


def plain(found: list[Neighbour]) -> list[Any]:
    return [(one.caption_id, one.text, one.score, one.sources) for one in found]


@pytest.mark.parametrize("k", [1, 4, 20, 64])
def test_the_best_captions_of_all_are_taken_each_text_once(merged: MergedSearch, k: int) -> None:
    found = merged.nearest(QUERIES, k)
    assert found.ids.shape == (len(QUERIES), k)  # always, so that batches can be joined
    several = 0
    for query, neighbours in zip(QUERIES, found.to_rows(), strict=True):
        wanted = expected(query, k, list(MEMBERS))
        assert plain(neighbours) == near(wanted)
        several += sum(len(one.sources) > 1 for one in neighbours)
    assert k < 20 or several
    column = found.to_column().to_pylist()
    assert [[one["sources"] for one in row] for row in column] == [
        [list(one.sources) for one in row] for row in found.to_rows()
    ]


def test_each_query_searches_the_index_that_it_names_and_passes_over_its_own_captions(merged: MergedSearch) -> None:
    names = ["shop", None, "few", "news", None, "few", "news"]
    own = [f"{expected(query, 1, list(MEMBERS))[0].text}.jpg" for query in QUERIES]
    found = find_nearest(merged, QUERIES, 5, own, names).to_rows()
    for query, name, image, neighbours in zip(QUERIES, names, own, found, strict=True):
        assert plain(neighbours) == near(expected(query, 5, [name] if name else list(MEMBERS), image))
    assert [len(neighbours) for neighbours in found] == [5, 5, 2, 5, 5, 2, 5]
    nobody = merged.nearest(QUERIES[:2], 3, names=["few", "few"])  # no index but one is asked
    assert [len(neighbours) for neighbours in nobody.to_rows()] == [2, 2]
    with pytest.raises(ConfigError, match=r"no index of this name[^$]*expected: news, shop, few\n  found: News"):
        merged.nearest(QUERIES[:2], 3, names=["News", None])
    with pytest.raises(RunError, match="needs the name of an index"):
        merged.nearest(QUERIES, 3, names=["few"])


def test_a_batch_is_its_queries_alone_and_nothing_is_found_for_none(merged: MergedSearch) -> None:
    together = merged.nearest(QUERIES, 6).to_rows()
    assert [merged.nearest(query[None], 6).to_rows()[0] for query in QUERIES] == together
    assert len(merged.nearest(QUERIES[:0], 6)) == 0
    assert merged.nearest(QUERIES, 0).to_rows() == [[]] * len(QUERIES)


def test_indexes_that_share_nothing_find_what_one_of_all_captions_finds(
    tmp_path: Path, cache: str, publish_index: PublishIndex
) -> None:
    publish_index(f"{tmp_path}/all", VECTORS, TEXTS)
    parts = {"one": slice(0, 11), "two": slice(11, 40), "three": slice(40, 60)}
    for name, rows in parts.items():
        publish_index(f"{tmp_path}/{name}", VECTORS[rows], TEXTS[rows])
    uris = [f"{tmp_path}/{name}" for name in parts]
    merged = open_indexes(name_indexes(uris), load_manifests(uris), cache)
    whole = Retriever.open(f"{tmp_path}/all", cache_dir=cache).nearest(QUERIES, 8)
    found = find_nearest(merged, QUERIES, 8)
    assert found.texts.to_pylist() == whole.texts.to_pylist()
    assert found.scores.tolist() == whole.scores.tolist()
    assert (merged.search_backend, merged.dim) == ("cpu", DIM)


def test_one_index_is_searched_as_it_is(tmp_path: Path, published: list[str], cache: str) -> None:
    alone = open_indexes(name_indexes(published[:1]), load_manifests(published[:1]), cache)
    assert isinstance(alone, Retriever)
    found = find_nearest(alone, QUERIES, 4, names=["news"] * len(QUERIES)).to_rows()
    assert found == alone.search(QUERIES, 4)
    assert found[0][0].sources == ("dump.csv",)


def test_versions_are_pinned_together_and_encoders_must_be_the_same(
    tmp_path: Path, published: list[str], cache: str, publish_index: PublishIndex
) -> None:
    manifests = load_manifests(published)
    opened = open_indexes(name_indexes(published), manifests, cache)
    assert split_index_ids(opened.index_id) == [manifest.index_id for manifest in manifests]
    publish_index(published[1], VECTORS[:5], TEXTS[:5])  # another version is current from now on
    assert load_manifests(published, opened.index_id) == manifests
    assert load_manifests(published) != manifests
    with pytest.raises(ConfigError, match="the id of its version"):
        load_manifests(published, manifests[0].index_id)
    other = EncoderIdentity(spec="hf:other", weights_sha256="1" * 64, dim=DIM)
    publish_index(f"{tmp_path}/other", VECTORS[:5], TEXTS[:5], encoder=other)
    with pytest.raises(ConfigError, match=r"different retrieval encoders[^$]*where: .*/other\n[^$]*found: hf:other"):
        load_manifests([published[0], f"{tmp_path}/other"])
