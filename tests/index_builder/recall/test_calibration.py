import json
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import index_builder.build as build_module
import index_builder.embedding.encoding as encoding_module
import index_builder.recall.calibration as calibration_module
import index_builder.shards.filling as sharding_module
from index_builder.build import Build, BuildReport, build_index
from index_builder.recall.measurement import imitate_images, lower_bound, nprobe_ladder
from jobs.build_index import describe_plan
from smallcap.config import CleaningConfig, IndexConfig, RecallConfig
from smallcap.errors import ConfigError, IndexIntegrityError, RunError, SchemaError
from smallcap.index.manifest import load_pointer
from smallcap.index.retriever import Retriever
from smallcap.model.clip_encoder import load_retrieval_encoder
from tests.index_files import unit_vectors

DIM = 16


def write_embedded_dump(folder: Path, rows: int, seed: int = 0) -> Path:
    """A Parquet dump whose embeddings lie in clusters, so that lists have something to separate."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((32, DIM))
    vectors = centres[rng.integers(32, size=rows)] + 0.4 * rng.standard_normal((rows, DIM))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    table = pa.table(
        {
            "caption": [f"caption {seed} {number}" for number in range(rows)],
            "embedding": pa.array(list(vectors.astype(np.float32)), pa.list_(pa.float32())),
        }
    )
    path = folder / f"dump-{seed}.parquet"
    pq.write_table(table, path)
    return path


BuildEmbedded = Callable[..., BuildReport]


@pytest.fixture
def build(tmp_path: Path, tiny_clip: Path) -> BuildEmbedded:
    """A function that builds an index of a dump with embeddings."""
    given: dict[str, object] = {
        "out": str(tmp_path / "index"),
        "encoder": f"hf:{tiny_clip}",
        "embedding_column": "embedding",
        "trust_embeddings": True,
        "cleaning": CleaningConfig(tokenizer=None),
    }
    return lambda dump, **options: build_index(IndexConfig.model_validate(given | {"dumps": (str(dump),)} | options))


class TestMeasures:
    def test_imitated_images_lie_at_the_gap(self) -> None:
        vectors = unit_vectors(50, 64)
        queries = imitate_images(vectors)
        assert np.allclose((queries * vectors).sum(axis=1), 0.3, atol=1e-5)
        assert np.allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-5)
        assert np.array_equal(queries, imitate_images(vectors))

    def test_the_bound_is_wilsons(self) -> None:
        assert lower_bound(np.ones(1024)) == pytest.approx(1 / (1 + 1.6449**2 / 1024))
        assert lower_bound(np.array([1.0] * 95 + [0.0] * 5)) == pytest.approx(0.9010, abs=1e-3)

    def test_the_ladder_ends_at_all_lists(self) -> None:
        assert nprobe_ladder(None) == (None,)
        assert nprobe_ladder(1) == (1,)
        assert nprobe_ladder(12) == (1, 2, 4, 8, 12)
        assert nprobe_ladder(16) == (1, 2, 4, 8, 16)


class TestCalibration:
    def test_a_flat_index_of_one_caption_misses_nothing(self, tmp_path: Path, build: BuildEmbedded) -> None:
        manifest = build(write_embedded_dump(tmp_path, 1), index_key="Flat").manifest
        assert [entry.recall for entry in manifest.recall] == [1.0, 1.0]

    def test_nprobe_rises_with_the_target(self, tmp_path: Path, build: BuildEmbedded) -> None:
        dump = write_embedded_dump(tmp_path, 4000)
        nprobes = []
        for target in (0.5, 0.9, 0.99):
            recall = RecallConfig(target=target, queries=512)
            manifest = build(dump, index_key="IVF64,SQfp16", shards=3, recall=recall).manifest
            at_4, at_10 = manifest.recall
            assert (at_4.k, at_10.k, at_4.queries, manifest.recall_target) == (4, 10, 512, target)
            assert at_4.recall >= (at_4.recall_low or 0) >= target
            assert (at_4.ceiling or 0) >= at_4.recall - 0.02
            assert manifest.recall_queries == "captions with a modality gap"
            assert at_4.nprobe == manifest.nprobe
            nprobes.append(manifest.nprobe or 0)
        assert nprobes == sorted(nprobes)
        assert nprobes[0] < nprobes[-1]
        assert len({manifest.name for manifest in (tmp_path / "index" / "versions").iterdir()}) == len(set(nprobes))
        assert len(list((tmp_path / "index" / "files").iterdir())) == 7  # the versions differ in how they are searched

    def test_a_missed_target_is_told_and_can_be_accepted(
        self, tmp_path: Path, build: BuildEmbedded, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(calibration_module, "_K_FACTORS", (1,))
        dump = write_embedded_dump(tmp_path, 1000)
        options = {"index_key": "PQ2", "recall": RecallConfig(queries=128)}
        with pytest.raises(RunError, match=r"misses its recall target(.|\n)*index_key=PQ2(.|\n)*--accept-recall"):
            build(dump, **options)
        assert not (tmp_path / "index" / "current.json").exists()
        monkeypatch.setattr(build_module, "write_shard", None)  # what is built already is kept
        manifest = build(dump, **(options | {"recall": RecallConfig(queries=128, accept=True)})).manifest
        assert manifest.recall[0].recall < 0.9
        assert (manifest.recall_target, manifest.nprobe) == (0.99, None)

    def test_a_coarse_codec_is_ranked_again_from_more_candidates(self, tmp_path: Path, build: BuildEmbedded) -> None:
        dump = write_embedded_dump(tmp_path, 2000)
        recall = RecallConfig(queries=128, target=0.9)
        fine = build(dump, index_key="IVF16,SQ8", recall=recall).manifest
        coarse = build(dump, index_key="IVF16,PQ8x4", recall=recall).manifest
        assert (fine.k_factor, fine.codec) == (4, "SQ8")
        assert coarse.k_factor > 4
        assert len(coarse.vectors) == len(coarse.shards)
        assert (coarse.recall[0].recall_low or 0) >= 0.9

    def test_given_images_are_the_queries(self, tmp_path: Path, build: BuildEmbedded) -> None:
        images = tmp_path / "images"
        images.mkdir()
        rng = np.random.default_rng(0)
        for number in range(40):
            Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8)).save(images / f"{number}.png")
        (images / "broken.png").write_bytes(b"no image")
        dump = write_embedded_dump(tmp_path, 500)
        recall = RecallConfig(calibration_images=(str(images),), target=0.8)
        manifest = build(dump, index_key="IVF8,Flat", recall=recall).manifest
        assert (manifest.recall_queries, manifest.recall[0].queries) == ("images", 20)
        with pytest.raises(ConfigError, match=r"too few calibration images(.|\n)*found: 1"):
            few = RecallConfig(calibration_images=(str(images / "0.png"),))
            build(dump, index_key="IVF4,Flat", recall=few)

    def test_a_shard_that_is_not_what_was_written(
        self, tmp_path: Path, build: BuildEmbedded, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        add = sharding_module.add_vectors
        monkeypatch.setattr(sharding_module, "add_vectors", lambda index, vectors, first: add(index, -vectors, first))
        dump = write_embedded_dump(tmp_path, 300)
        with pytest.raises(IndexIntegrityError, match="does not hold the vector that was written"):
            build(dump, index_key="IVF4,SQfp16")


class TestKeys:
    @pytest.mark.parametrize("key", ["Flat", "IVF16,SQfp16", "IVF,SQ8", "IVF16,Flat", "SQ8", "HNSW16", "OPQ4,IVF8,PQ4"])
    def test_builds_repeat_byte_for_byte_and_shards_change_no_answer(
        self, tmp_path: Path, build: BuildEmbedded, key: str
    ) -> None:
        dump = write_embedded_dump(tmp_path, 1500)
        options = {"index_key": key, "recall": RecallConfig(queries=64, target=0.3)}
        one = build(dump, **options, shards=1)
        many = build(dump, **options, shards=5, out=str(tmp_path / "many"))
        again = build(dump, **options, shards=5, out=str(tmp_path / "again"))
        files = [
            {path.name: path.read_bytes() for path in Path(f"{tmp_path}/{name}/files").iterdir()}
            for name in ("many", "again")
        ]
        assert files[0] == files[1]
        assert many.manifest.index_id == again.manifest.index_id
        if key == "HNSW16":  # every shard has a graph of its own
            return
        assert one.manifest.nprobe == many.manifest.nprobe
        answers = []
        for report in (one, many):
            retriever = Retriever.open(report.index_uri, cache_dir=str(tmp_path / "cache"))
            answers.append(retriever.search(unit_vectors(50, DIM, seed=1), 7))
        assert answers[0] == answers[1]

    @pytest.mark.parametrize(
        ("key", "message"),
        [
            ("IVF", "does not know"),
            ("IVF8,Flat,Refine(SQ8)", "not served"),
            ("IDMap,Flat", "not served"),
            ("IVF9999,Flat", "fewer captions"),
        ],
    )
    def test_keys_that_cannot_be_built_fail_before_anything_is_embedded(
        self, tmp_path: Path, build: BuildEmbedded, monkeypatch: pytest.MonkeyPatch, key: str, message: str
    ) -> None:
        monkeypatch.setattr(encoding_module, "EmbedSlices", None)
        with pytest.raises(ConfigError, match=message):
            build(write_embedded_dump(tmp_path, 300), index_key=key)


class TestImports:
    def test_embeddings_of_another_encoder_are_noticed(self, tmp_path: Path, build: BuildEmbedded) -> None:
        dump = write_embedded_dump(tmp_path, 100)
        with pytest.raises(ConfigError, match=r"not this encoder's(.|\n)*trust_embeddings"):
            build(dump, trust_embeddings=False)
        assert build(dump).embedded == 0

    @pytest.mark.parametrize("layout", ["parquet", "clip-retrieval", "reference"])
    def test_an_encoders_own_embeddings_are_taken(
        self, tmp_path: Path, tiny_clip: Path, build: BuildEmbedded, layout: str
    ) -> None:
        folder = tmp_path / "datastore"
        texts = [f"a {colour} thing number {number}" for colour in ("red", "blue") for number in range(40)]
        encoder = load_retrieval_encoder(f"hf:{tiny_clip}")
        vectors = encoder.encode_texts(texts)
        column = None
        if layout == "parquet":
            folder, column = tmp_path / "dump.parquet", "embedding"
            embeddings = pa.array(list(vectors.astype(np.float16)), pa.list_(pa.float16()))
            pq.write_table(pa.table({"caption": texts, "embedding": embeddings}), folder)
        elif layout == "reference":
            folder.mkdir()
            index = faiss.IndexFlatIP(DIM)
            index.add(vectors)
            faiss.write_index(index, str(folder / "coco_index"))
            (folder / "coco_index_captions.json").write_text(json.dumps(texts))
        else:
            (folder / "text_emb").mkdir(parents=True)
            (folder / "metadata").mkdir()
            np.save(folder / "text_emb" / "text_emb_0.npy", vectors.astype(np.float16))
            pq.write_table(pa.table({"caption": texts}), folder / "metadata" / "metadata_0.parquet")
        report = build(folder, trust_embeddings=False, embedding_column=column)
        assert (report.new_captions, report.embedded) == (80, 0)
        assert report.manifest.embedding_dtype == "imported"
        retriever = Retriever.open(report.index_uri, encoder=encoder.identity, cache_dir=str(tmp_path / "cache"))
        found = retriever.search(vectors[::7], 1)
        assert [best.score for [best] in found] == pytest.approx([1.0] * len(found), abs=1e-3)
        if layout == "reference":  # float32 comes through whole
            assert [best.text for [best] in found] == texts[::7]

    def test_embeddings_of_another_length(self, tmp_path: Path, build: BuildEmbedded) -> None:
        table = pa.table({"caption": ["a"], "embedding": pa.array([[1.0, 0.0]], pa.list_(pa.float32()))})
        pq.write_table(table, tmp_path / "dump.parquet")
        with pytest.raises(SchemaError):
            build(tmp_path / "dump.parquet")


def test_a_dry_run_counts_and_leaves_nothing(tmp_path: Path, tiny_clip: Path) -> None:
    (tmp_path / "dump.csv").write_text("image,caption\n" + "".join(f"i,caption {n % 150}\n" for n in range(200)))
    config = IndexConfig(
        dumps=(str(tmp_path / "dump.csv"),), out=str(tmp_path / "index"), encoder=f"hf:{tiny_clip}", index_key="IVF,SQ8"
    )
    plan = Build(config).plan()
    assert (plan.rows, plan.new_captions, plan.to_embed, plan.dropped["duplicate"]) == (200, 150, 150, 50)
    assert plan.index.index_key == "IVF2,SQ8"
    assert plan.embed_s > 0
    assert "150 new captions of 200 rows" in describe_plan(plan)
    left = [path for path in tmp_path.joinpath("index").rglob("*") if path.is_file()]
    assert left == []
    with pytest.raises(Exception, match="no published index"):
        load_pointer(str(tmp_path / "index"))
