from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest

from smallcap import index_cache, storage
from smallcap.caption_store import load_caption_sample
from smallcap.errors import IndexIntegrityError, ManifestError, RunError
from smallcap.index_manifest import MANIFEST_FILE, EncoderIdentity, IndexManifest, version_uri
from smallcap.retriever import Neighbour, Retriever

PublishIndex = Callable[..., IndexManifest]
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "index_v1"


def unit_vectors(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def exact_ids(vectors: np.ndarray, queries: np.ndarray, k: int) -> list[list[int]]:
    """The readable reference: float64 scores rounded to float32, best first, ties by id."""
    scores = (queries.astype(np.float64) @ vectors.astype(np.float64).T).astype(np.float32)
    return [
        sorted(range(len(vectors)), key=lambda row: (-scores[query, row], row))[:k] for query in range(len(queries))
    ]


def ids(results: list[list[Neighbour]]) -> list[list[int]]:
    return [[neighbour.caption_id for neighbour in neighbours] for neighbours in results]


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


class TestSearch:
    @pytest.mark.parametrize("k", [1, 4, 30])
    def test_shards_and_batches_change_nothing(
        self, tmp_path: Path, publish_index: PublishIndex, cache: str, k: int
    ) -> None:
        vectors = unit_vectors(500, 64)
        vectors[400:420] = vectors[7]  # a tie longer than any margin, over a shard's border
        texts = [f"text {number}" for number in range(500)]
        queries = np.concatenate([unit_vectors(20, 64, seed=1), vectors[5:10]])
        expected = exact_ids(vectors, queries, k)
        results = []
        for shards in (1, 3, 7):
            publish_index(f"{tmp_path}/{shards}", vectors, texts, shards=shards)
            retriever = Retriever.open(f"{tmp_path}/{shards}", cache_dir=cache)
            together = retriever.search(queries, k)
            assert together == [retriever.search(query[None], k)[0] for query in queries]
            results.append(together)
        assert results[0] == results[1] == results[2]
        assert ids(results[0]) == expected
        assert all(n.text == f"text {n.caption_id}" for neighbours in results[0] for n in neighbours)

    def test_asking_for_more_than_there_is(self, tmp_path: Path, publish_index: PublishIndex, cache: str) -> None:
        vectors = unit_vectors(5, 8)
        publish_index(f"{tmp_path}/index", vectors, list("abcde"), shards=2)
        retriever = Retriever.open(f"{tmp_path}/index", cache_dir=cache)
        assert ids(retriever.search(vectors, 9)) == exact_ids(vectors, vectors, 5)
        assert retriever.search(vectors, 0) == [[]] * 5
        assert retriever.search(np.zeros((0, 8), np.float32), 3) == []

    def test_own_captions_are_excluded_through_every_image_that_has_them(
        self, tmp_path: Path, publish_index: PublishIndex, cache: str
    ) -> None:
        vectors = unit_vectors(60, 8)
        # Each image has up to four captions; every third caption is shared with the next image.
        image_ids: list[list[str] | None] = [
            [f"img{number // 3}"] + ([f"img{number // 3 + 1}"] if number % 3 == 0 else []) for number in range(60)
        ]
        image_ids[10] = None
        for shards in (1, 4):
            uri = f"{tmp_path}/{shards}"
            publish_index(uri, vectors, [f"t{number}" for number in range(60)], image_ids, shards=shards)
            retriever = Retriever.open(uri, cache_dir=cache)
            exclude = [None if row % 7 == 0 else f"img{row // 3}" for row in range(60)]
            found = ids(retriever.search(vectors, 5, exclude))
            for row, all_ids in enumerate(exact_ids(vectors, vectors, 60)):
                assert found[row] == [other for other in all_ids if exclude[row] not in (image_ids[other] or [])][:5]

    def test_unusable_queries(self, tmp_path: Path, publish_index: PublishIndex, cache: str) -> None:
        publish_index(f"{tmp_path}/index", unit_vectors(5, 8), list("abcde"))
        retriever = Retriever.open(f"{tmp_path}/index", cache_dir=cache)
        with pytest.raises(RunError, match=r"do not fit(.|\n)*\[B, 8\](.|\n)*\[2, 9\]"):
            retriever.search(unit_vectors(2, 9), 1)
        with pytest.raises(RunError, match=r"not finite(.|\n)*\[1\]"):
            retriever.search(np.array([[1.0] * 8, [np.nan] * 8], np.float32), 1)
        with pytest.raises(RunError, match="one excluded image id"):
            retriever.search(unit_vectors(2, 8), 1, ["a"])


class TestOpen:
    @pytest.fixture
    def index(self, tmp_path: Path, publish_index: PublishIndex) -> str:
        uri = str(tmp_path / "index")
        publish_index(uri, unit_vectors(50, 8), [f"t{number}" for number in range(50)], shards=2)
        return uri

    def file(self, index: str, name: str) -> Path:
        [path] = Path(index).glob(f"versions/*/{name}")
        return path

    def test_another_encoder_is_refused_before_any_file_is_opened(self, index: str, cache: str) -> None:
        shutil.rmtree(self.file(index, "shards"))
        for other in (
            EncoderIdentity(spec="hf:other", weights_sha256="1" * 64, dim=8),
            EncoderIdentity(spec="hf:test", weights_sha256="0" * 64, dim=9),
        ):
            with pytest.raises(IndexIntegrityError, match="another retrieval encoder"):
                Retriever.open(index, encoder=other, cache_dir=cache)

    @pytest.mark.parametrize("name", ["shards/shard-00001.faiss", "captions/captions-00000.arrow", "template.faiss"])
    def test_a_flipped_byte(self, index: str, cache: str, name: str) -> None:
        Retriever.open(index, cache_dir=cache)  # so that the node has a stamp that calls the files verified
        path = self.file(index, name)
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
        with pytest.raises(IndexIntegrityError, match=f"damaged(.|\n)*{name}(.|\n)*sha256"):
            Retriever.open(index, cache_dir=cache)

    def test_a_truncated_and_a_missing_shard(self, index: str, cache: str) -> None:
        path = self.file(index, "shards/shard-00001.faiss")
        path.write_bytes(path.read_bytes()[:-8])
        with pytest.raises(IndexIntegrityError, match=r"damaged(.|\n)*bytes"):
            Retriever.open(index, cache_dir=cache)
        path.unlink()
        with pytest.raises(IndexIntegrityError, match="missing"):
            Retriever.open(index, cache_dir=cache)

    def test_a_changed_manifest(self, index: str, cache: str) -> None:
        path = self.file(index, MANIFEST_FILE)
        values = json.loads(path.read_text())
        values["shards"][0]["sha256"] = "f" * 64
        path.write_text(json.dumps(values))
        with pytest.raises(IndexIntegrityError, match="does not belong"):
            Retriever.open(index, cache_dir=cache)

    @pytest.mark.parametrize(
        ("factory", "message"),
        [
            ("IVF2,Flat", "another kind"),
            ("Flat-l2", "another kind"),
            ("Flat-dim", "dimension, metric"),
            ("Flat-rows", "dimension, metric"),
        ],
    )
    def test_a_file_of_another_kind_with_a_right_checksum(
        self, index: str, cache: str, factory: str, message: str
    ) -> None:
        dim = 4 if factory == "Flat-dim" else 8
        metric = faiss.METRIC_L2 if factory == "Flat-l2" else faiss.METRIC_INNER_PRODUCT
        other = faiss.index_factory(dim, factory.split("-", maxsplit=1)[0], metric)
        vectors = unit_vectors(24 if factory == "Flat-rows" else 25, dim)
        other.train(vectors)
        other.add(vectors)
        version = self.file(index, MANIFEST_FILE).parent
        faiss.write_index(other, str(version / "shards/shard-00000.faiss"))
        manifest = IndexManifest.model_validate_json((version / MANIFEST_FILE).read_text())
        path = version / "shards/shard-00000.faiss"
        lying = manifest.shards[0].model_copy(
            update={"bytes": path.stat().st_size, "sha256": storage.sha256_file(path)}
        )
        manifest = manifest.model_copy(update={"shards": (lying, manifest.shards[1])})
        with pytest.raises(IndexIntegrityError, match=message):
            Retriever(manifest, version)

    def test_an_older_version_can_be_named(self, index: str, cache: str, publish_index: PublishIndex) -> None:
        before = Retriever.open(index, cache_dir=cache).index_id
        publish_index(index, unit_vectors(3, 8), ["x", "y", "z"])
        assert len(Retriever.open(index, cache_dir=cache).captions) == 3
        assert len(Retriever.open(index, cache_dir=cache, index_id=before).captions) == 50

    def test_no_index(self, tmp_path: Path) -> None:
        with pytest.raises(ManifestError, match="no published index"):
            Retriever.open(str(tmp_path / "absent"))


class TestCaptionStore:
    def test_rows_and_samples(self, tmp_path: Path, publish_index: PublishIndex, cache: str) -> None:
        uri = f"{tmp_path}/index"
        images: list[list[str] | None] = [["a", "b"], None, ["c"], [], None]
        publish_index(uri, unit_vectors(5, 8), list("vwxyz"), images, shards=2)
        store = Retriever.open(uri, cache_dir=cache).captions
        assert store.texts(np.array([4, 0, 0, 2])) == ["z", "v", "v", "x"]
        assert store.image_ids(np.array([0, 1, 2])) == [["a", "b"], [], ["c"]]
        assert [(row.caption_id, row.text, row.source, row.image_ids) for row in store.rows([2, 0])] == [
            (2, "x", "dump.csv", ("c",)),
            (0, "v", "dump.csv", ("a", "b")),
        ]
        assert [row.text for row in store.sample(3)] == ["v", "w", "y"]
        with pytest.raises(IndexIntegrityError, match="outside the caption store"):
            store.texts(np.array([5]))
        manifest, rows = load_caption_sample(uri, 10)
        assert manifest.ntotal == 5
        assert [row.text for row in rows] == ["v", "w"]


def _open_remote(uri: str, cache: str, results: multiprocessing.Queue[object]) -> None:
    downloads: list[str] = []
    download = storage.download

    def counted(source: str, path: str | Path) -> None:
        downloads.append(source)
        download(source, path)

    storage.download = counted
    neighbours = Retriever.open(uri, cache_dir=cache).search(unit_vectors(3, 8, seed=2), 4)
    results.put((len(downloads), neighbours))


class TestNodeCache:
    def test_several_processes_download_once(self, s3: str, cache: str, publish_index: PublishIndex) -> None:
        vectors = unit_vectors(60, 8)
        uri = f"{s3}/some/index"
        publish_index(uri, vectors, [f"t{number}" for number in range(60)], shards=3)
        context = multiprocessing.get_context("spawn")
        results: multiprocessing.Queue[object] = context.Queue()
        processes = [context.Process(target=_open_remote, args=(uri, cache, results)) for _ in range(3)]
        for process in processes:
            process.start()
        found = [results.get(timeout=60) for _ in processes]
        for process in processes:
            process.join()
        assert sorted(count for count, _ in found) == [0, 0, 7]  # type: ignore[misc]
        assert all(ids(n) == exact_ids(vectors, unit_vectors(3, 8, seed=2), 4) for _, n in found)  # type: ignore[misc]
        assert sorted(path.name for path in Path(cache, "indexes").iterdir()) == [
            path.name for path in Path(cache, "indexes").iterdir() if not path.name.startswith(".")
        ]

    def test_a_damaged_copy_is_fetched_again(self, s3: str, cache: str, publish_index: PublishIndex) -> None:
        manifest = publish_index(f"{s3}/index", unit_vectors(20, 8), ["t"] * 20)
        Retriever.open(f"{s3}/index", cache_dir=cache)
        copy = Path(cache, "indexes", manifest.index_id, manifest.shards[0].file)
        data = bytearray(copy.read_bytes())
        data[-1] ^= 1
        copy.unlink()
        copy.write_bytes(data)
        assert len(Retriever.open(f"{s3}/index", cache_dir=cache).search(unit_vectors(1, 8), 3)[0]) == 3
        index_cache.check_file(copy, manifest.shards[0])

    def test_a_damaged_object_is_an_error_after_a_second_try(
        self, s3: str, cache: str, publish_index: PublishIndex, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        manifest = publish_index(f"{s3}/index", unit_vectors(20, 8), ["t"] * 20)
        damaged = storage.join(version_uri(f"{s3}/index", manifest.index_id), manifest.shards[0].file)
        storage.write_bytes(damaged, storage.read_bytes(damaged)[:-1] + b"\0")
        asked = []
        download = storage.download
        monkeypatch.setattr(storage, "download", lambda uri, path: (asked.append(uri), download(uri, path)))
        with pytest.raises(IndexIntegrityError, match=r"damaged(.|\n)*sha256"):
            Retriever.open(f"{s3}/index", cache_dir=cache)
        assert asked.count(damaged) == 2
        assert list(Path(cache, "indexes").iterdir()) == []

    def test_inspecting_a_remote_index_fetches_no_vectors(self, s3: str, publish_index: PublishIndex) -> None:
        publish_index(f"{s3}/index", unit_vectors(4, 8), list("abcd"))
        assert [row.text for row in load_caption_sample(f"{s3}/index", 2)[1]] == ["a", "c"]


def test_golden_index_v1(cache: str) -> None:
    """Format version 1 stays readable; the folder is never written again."""
    expected = json.loads((GOLDEN / "expected.json").read_text())
    retriever = Retriever.open(str(GOLDEN / "index"), cache_dir=cache)
    assert retriever.index_id == expected["index_id"]
    assert [row.__dict__ | {"image_ids": list(row.image_ids)} for row in retriever.captions.sample(100)] == expected[
        "rows"
    ]
    queries = np.array(expected["queries"], np.float32)
    found = retriever.search(queries, 3, expected["exclude"])
    assert [[n.caption_id for n in neighbours] for neighbours in found] == expected["neighbours"]
