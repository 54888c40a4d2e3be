import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smallcap.errors import IndexIntegrityError, ManifestError, RunError
from smallcap.index.caption_store import load_caption_sample
from smallcap.index.manifest import EncoderIdentity, load_manifest, manifest_uri
from smallcap.index.retriever import Neighbour, Retriever
from tests.index_files import OpenIndex, PublishIndex, unit_vectors

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


def exact_ids(vectors: np.ndarray, queries: np.ndarray, k: int) -> list[list[int]]:
    """The readable reference: float64 scores rounded to float32, best first, ties by id."""
    scores = (queries.astype(np.float64) @ vectors.astype(np.float64).T).astype(np.float32)
    return [
        sorted(range(len(vectors)), key=lambda row: (-scores[query, row], row))[:k] for query in range(len(queries))
    ]


def ids(results: list[list[Neighbour]]) -> list[list[int]]:
    return [[neighbour.caption_id for neighbour in neighbours] for neighbours in results]


@dataclass(frozen=True)
class Key:
    """An index key and how indexes of it are searched in these tests."""

    index_key: str
    nprobe: int | None = None
    k_factor: int = 1

    def settings(self) -> dict[str, Any]:
        return self.__dict__


KEYS = [
    Key("Flat"),
    Key("IVF8,Flat", 3),
    Key("IVF8_HNSW8,Flat", 3),
    Key("IVF8,SQfp16", 3),
    Key("IVF8,SQ8", 3, 2),
    Key("SQ8", None, 2),
    Key("IVF8,PQ4", 3, 4),
    Key("IVF8,PQ8x4fs", 3, 4),
    Key("IVF8,RaBitQ", 3, 8),
    Key("HNSW16", 600, 2),  # so many candidates that each shard's graph is searched whole
    Key("OPQ4,IVF8,PQ4", 3, 4),
]
ROWS = 600


class TestEveryKey:
    """What holds whatever the index key: the answers are those of a readable reference, in any batch and any shards."""

    @pytest.fixture(params=KEYS, ids=lambda key: key.index_key)
    def key(self, request: pytest.FixtureRequest) -> Key:
        return request.param

    @pytest.fixture
    def vectors(self) -> np.ndarray:
        vectors = unit_vectors(ROWS, 16)
        vectors[480:510] = vectors[7]  # a tie longer than any margin, over a shard's border
        return vectors

    @pytest.fixture
    def queries(self, vectors: np.ndarray) -> np.ndarray:
        return np.concatenate([unit_vectors(20, 16, seed=1), vectors[5:10]])

    @pytest.fixture
    def open_shards(self, open_index: OpenIndex, key: Key, vectors: np.ndarray) -> OpenIndex:
        """A function that opens the vectors in so many shards."""
        return lambda shards, **settings: open_index(vectors, self.image_ids(), shards, **(key.settings() | settings))

    def image_ids(self) -> list[list[str] | None]:
        """Each image has up to four captions; every third caption is shared with the next image, and one has none."""
        images: list[list[str] | None] = [
            [f"img{number // 3}"] + ([f"img{number // 3 + 1}"] if number % 3 == 0 else []) for number in range(ROWS)
        ]
        images[10] = None
        return images

    def reference(
        self, retriever: Retriever, vectors: np.ndarray, query: np.ndarray, k: int, forbidden: Collection[int] = ()
    ) -> list[int]:
        """The readable algorithm over one shard: every reachable candidate, filtered, cut, ranked again, cut."""
        [shard] = retriever._partition.shards  # type: ignore[attr-defined]
        manifest = retriever.manifest
        scores, found = shard.candidates(query[None], len(vectors), manifest.nprobe)
        order = sorted((-score, row) for score, row in zip(scores[0], found[0], strict=True) if row >= 0)
        kept = [row for _, row in order if row not in forbidden][: k * manifest.k_factor]
        if manifest.vectors:
            stored = vectors.astype(np.float16).astype(np.float64)
            kept.sort(key=lambda row: (-np.float32(query.astype(np.float64) @ stored[row]), row))
        return kept[:k]

    @pytest.mark.parametrize("k", [1, 5, 40])
    def test_shards_and_batches_change_nothing(
        self, open_shards: OpenIndex, key: Key, vectors: np.ndarray, queries: np.ndarray, k: int
    ) -> None:
        results = []
        for shards in (1, 3, 7):
            retriever = open_shards(shards)
            together = retriever.search(queries, k)
            assert together == [retriever.search(query[None], k)[0] for query in queries]
            results.append(together)
            if shards == 1:
                assert ids(together) == [self.reference(retriever, vectors, query, k) for query in queries]
        assert results[0] == results[1] == results[2]
        if key.index_key == "Flat":
            assert ids(results[0]) == exact_ids(vectors, queries, k)
        for query, neighbours in zip(queries, results[0], strict=True):
            assert all(n.text == f"text {n.caption_id}" for n in neighbours)
            assert np.diff([n.score for n in neighbours]).max(initial=-1) <= 0
            for neighbour in neighbours:
                assert neighbour.score == pytest.approx(query @ vectors[neighbour.caption_id], abs=1e-3)

    def test_removed_captions_and_own_ones_are_passed_over(
        self, open_shards: OpenIndex, vectors: np.ndarray, queries: np.ndarray
    ) -> None:
        nearest = np.argsort(-(queries @ vectors.T), axis=1)[:, :8]
        removed = sorted({*nearest[::2].ravel().tolist(), *range(485, 500)})
        exclude = [None if row % 3 == 0 else f"img{nearest[row, 0] // 3}" for row in range(len(queries))]
        images = self.image_ids()
        results = []
        for shards in (1, 3, 7):
            retriever = open_shards(shards, removed=removed)
            assert retriever.manifest.ntotal == ROWS - len(removed)
            together = retriever.search(queries, 5, exclude)
            alone = [retriever.search(query[None], 5, [one])[0] for query, one in zip(queries, exclude, strict=True)]
            assert together == alone
            results.append(together)
            if shards == 1:
                for query, one, found in zip(queries, exclude, ids(together), strict=True):
                    forbidden = {row for row in range(ROWS) if row in removed or one in (images[row] or [])}
                    assert found == self.reference(retriever, vectors, query, 5, forbidden)
        assert results[0] == results[1] == results[2]

    def test_as_many_as_are_left_come_back(
        self, open_shards: OpenIndex, key: Key, vectors: np.ndarray, queries: np.ndarray
    ) -> None:
        """All but six captions are removed, and those are among the farthest of every query."""
        everywhere = ROWS if key.index_key == "HNSW16" else 8
        left = set(np.argsort((queries @ vectors.T).max(axis=0))[:6].tolist())
        removed = [row for row in range(ROWS) if row not in left]
        for shards in (1, 3):
            retriever = open_shards(shards, removed=removed, nprobe=everywhere)
            for k in (1, 4, 6, 9):
                assert [len(set(found)) for found in ids(retriever.search(queries, k))] == [min(k, 6)] * len(queries)
            assert {row for found in ids(retriever.search(queries, 6)) for row in found} == left


class TestQueries:
    @pytest.fixture
    def retriever(self, open_index: OpenIndex) -> Retriever:
        return open_index(unit_vectors(5, 8), shards=2)

    def test_asking_for_more_than_there_is(self, retriever: Retriever) -> None:
        vectors = unit_vectors(5, 8)
        assert ids(retriever.search(vectors, 9)) == exact_ids(vectors, vectors, 5)
        assert retriever.search(vectors, 0) == [[]] * 5
        assert retriever.search(np.zeros((0, 8), np.float32), 3) == []

    def test_unusable_queries(self, retriever: Retriever) -> None:
        with pytest.raises(RunError, match=r"does not fit(.|\n)*\[B, 8\](.|\n)*\[2, 9\]"):
            retriever.search(unit_vectors(2, 9), 1)
        with pytest.raises(RunError, match=r"not finite(.|\n)*\[1\]"):
            retriever.search(np.array([[1.0] * 8, [np.nan] * 8], np.float32), 1)
        with pytest.raises(RunError, match="number of excluded image ids"):
            retriever.search(unit_vectors(2, 8), 1, ["a"])


class TestOpen:
    @pytest.fixture
    def index(self, tmp_path: Path, publish_index: PublishIndex) -> str:
        uri = str(tmp_path / "index")
        publish_index(uri, unit_vectors(50, 8), [f"t{number}" for number in range(50)], shards=2)
        return uri

    def file(self, index: str, kind: str) -> Path:
        """Returns the path of one of the version's files."""
        manifest = load_manifest(index)
        return Path(index) / {"shard": manifest.shards[1], "captions": manifest.captions[0]}[kind].file

    def test_another_encoder_is_refused_before_any_file_is_opened(self, index: str, cache: str) -> None:
        shutil.rmtree(self.file(index, "shard").parent)
        for other in (
            EncoderIdentity(spec="hf:other", weights_sha256="1" * 64, dim=8),
            EncoderIdentity(spec="hf:test", weights_sha256="0" * 64, dim=9),
        ):
            with pytest.raises(IndexIntegrityError, match="another retrieval encoder"):
                Retriever.open(index, encoder=other, cache_dir=cache)

    @pytest.mark.parametrize("kind", ["shard", "captions"])
    def test_a_changed_a_truncated_and_a_missing_file(self, index: str, cache: str, kind: str) -> None:
        Retriever.open(index, cache_dir=cache)  # so that the node has a stamp that calls the files verified
        path = self.file(index, kind)
        data = path.read_bytes()
        path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
        with pytest.raises(IndexIntegrityError, match=f"damaged(.|\\n)*{path.name}(.|\\n)*sha256"):
            Retriever.open(index, cache_dir=cache)
        path.write_bytes(data[:-8])
        with pytest.raises(IndexIntegrityError, match=r"damaged(.|\n)*bytes"):
            Retriever.open(index, cache_dir=cache)
        path.unlink()
        with pytest.raises(IndexIntegrityError, match="missing"):
            Retriever.open(index, cache_dir=cache)

    def test_a_changed_manifest(self, index: str, cache: str) -> None:
        path = Path(manifest_uri(index, load_manifest(index).index_id))
        values = json.loads(path.read_text())
        values["shards"][0]["sha256"] = "f" * 64
        path.write_text(json.dumps(values))
        with pytest.raises(IndexIntegrityError, match="does not belong"):
            Retriever.open(index, cache_dir=cache)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"vectors": ()}, "`vectors` files of the manifest do not fit"),
            ({"shards": "gap"}, "contiguous ids"),
            ({"captions": "short"}, "one caption for each vector"),
        ],
    )
    def test_a_manifest_that_contradicts_itself(
        self, tmp_path: Path, publish_index: PublishIndex, change: dict[str, Any], message: str
    ) -> None:
        uri = f"{tmp_path}/lossy"
        manifest = publish_index(uri, unit_vectors(50, 8), ["t"] * 50, shards=2, index_key="SQ8", k_factor=2)
        late = manifest.shards[1].model_copy(update={"first_id": 26})
        made = {"gap": (manifest.shards[0], late), "short": manifest.captions[:1], (): ()}
        changed = {name: made[value] for name, value in change.items()}
        with pytest.raises(ManifestError, match=message):
            Retriever(manifest.model_copy(update=changed), Path(uri))

    def test_removed_ids_that_are_not_what_the_manifest_says(self, tmp_path: Path, publish_index: PublishIndex) -> None:
        uri = f"{tmp_path}/index"
        manifest = publish_index(uri, unit_vectors(50, 8), ["t"] * 50, removed=[3, 4])
        assert manifest.removed is not None
        file = Path(uri, manifest.removed.file)
        for wrong in ([4, 3], [3, 3], [3, 50], [-1, 3], [3], [3.0, 4.0]):
            np.save(file, np.array(wrong))
            with pytest.raises(IndexIntegrityError, match="removed ids"):
                Retriever(manifest, Path(uri))

    def test_another_version_can_be_named_and_none_is_an_error(
        self, index: str, cache: str, publish_index: PublishIndex
    ) -> None:
        before = Retriever.open(index, cache_dir=cache).index_id
        publish_index(index, unit_vectors(3, 8), ["x", "y", "z"])
        assert len(Retriever.open(index, cache_dir=cache).captions) == 3
        assert len(Retriever.open(index, cache_dir=cache, index_id=before).captions) == 50
        with pytest.raises(ManifestError, match="no published index"):
            Retriever.open(f"{index}/absent")


def test_a_caption_store_gives_rows_and_samples(tmp_path: Path, publish_index: PublishIndex, cache: str) -> None:
    uri = f"{tmp_path}/index"
    images: list[list[str] | None] = [["a", "b"], None, ["c"], [], None]
    publish_index(uri, unit_vectors(5, 8), list("vwxyz"), images, shards=2)
    store = Retriever.open(uri, cache_dir=cache).captions
    assert store.texts(np.array([4, 0, 0, 2])).to_pylist() == ["z", "v", "v", "x"]
    assert store.texts(np.array([], np.int64)).to_pylist() == []
    assert store.image_ids(np.array([4, 0, 1, 2, 3])).to_pylist() == [None, ["a", "b"], None, ["c"], []]
    assert [(row.caption_id, row.text, row.sources, row.image_ids) for row in store.rows([2, 0])] == [
        (2, "x", ("dump.csv",), ("c",)),
        (0, "v", ("dump.csv",), ("a", "b")),
    ]
    assert [row.text for row in store.sample(3)] == ["v", "w", "y"]
    with pytest.raises(IndexIntegrityError, match="outside the caption store"):
        store.texts(np.array([5]))
    manifest, rows = load_caption_sample(uri, 10)
    assert (manifest.ntotal, [row.text for row in rows]) == (5, ["v", "w"])


@pytest.mark.parametrize(("name", "key"), [("index_v1", "IVF4,SQ8"), ("index_v1_flat", "Flat")])
def test_golden_index_v1(cache: str, name: str, key: str) -> None:
    """Format version 1 stays readable; the folders are never written again."""
    golden = GOLDEN / name
    expected = json.loads((golden / "expected.json").read_text())
    retriever = Retriever.open(str(golden / "index"), cache_dir=cache)
    manifest = retriever.manifest
    assert (manifest.format_version, manifest.index_key) == (1, key)
    assert (manifest.index_id, manifest.ntotal) == (expected["index_id"], expected["ntotal"])
    found_rows = [
        {"caption_id": row.caption_id, "text": row.text, "sources": list(row.sources), "image_ids": list(row.image_ids)}
        for row in retriever.captions.sample(100)
    ]
    assert found_rows == expected["rows"]
    found = retriever.search(np.array(expected["queries"], np.float32), 3, expected["exclude"])
    assert [[n.caption_id for n in neighbours] for neighbours in found] == expected["neighbours"]
    everything = retriever.search(np.array(expected["queries"][:1], np.float32), 100)[0]
    assert {n.caption_id for n in everything}.isdisjoint(expected.get("removed", []))
    for parent in manifest.parents:
        assert Retriever.open(str(golden / "index"), cache_dir=cache, index_id=parent).manifest.ntotal == 56
