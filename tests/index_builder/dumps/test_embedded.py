import io
import json
import tracemalloc
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from index_builder.dumps.files import DumpFile, find_dumps, open_dump, scan_dump
from smallcap import storage
from smallcap.captions.rows import CaptionColumns, CaptionRow
from smallcap.errors import ConfigError, IndexIntegrityError, SchemaError
from tests.index_files import unit_vectors

COLUMNS = CaptionColumns("caption", "image_path")


unit_rows = partial(unit_vectors, dim=4)


def write_pair(folder: Path, number: str, vectors: np.ndarray, embeddings: str = "text_emb/text_emb_") -> None:
    """Writes a pair as clip-retrieval does, with another file of image embeddings beside it."""
    for path in (folder / f"{embeddings}{number}.npy", folder / "img_emb" / f"img_emb_{number}.npy"):
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, vectors if path.parent.name != "img_emb" else np.full((9, 9), np.nan))
    (folder / "metadata").mkdir(exist_ok=True)
    columns = {"caption": [f"text {number}-{row}" for row in range(len(vectors))], "image_path": range(len(vectors))}
    pq.write_table(pa.table(columns), folder / "metadata" / f"metadata_{number}.parquet")


def write_datastore(folder: Path, vectors: np.ndarray, captions: object, index: faiss.Index | None = None) -> None:
    folder.mkdir(exist_ok=True)
    if index is None:
        index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    faiss.write_index(index, str(folder / "coco_index"))
    (folder / "coco_index_captions.json").write_text(json.dumps(captions))


def rows_of(dump: DumpFile, columns: CaptionColumns = COLUMNS) -> list[CaptionRow]:
    with open_dump(dump, columns) as rows:
        return list(rows)


def companions(folder: Path | str) -> dict[str, str | None]:
    def inside(uri: str) -> str:
        return uri.removeprefix(f"{folder}/")

    return {inside(dump.uri): dump.embeddings and inside(dump.embeddings) for dump in find_dumps([str(folder)])}


@pytest.mark.parametrize("numbers", [("0",), ("00", "01", "10"), ("9", "10", "11")])
def test_clip_retrieval_folder(tmp_path: Path, numbers: tuple[str, ...]) -> None:
    vectors = {number: unit_rows(3, seed=int(number)).astype(np.float16) for number in numbers}
    for number in numbers:
        write_pair(tmp_path, number, vectors[number])
    found = {dump.uri: dump for dump in find_dumps([str(tmp_path)])}
    assert len(found) == len(numbers)
    for number in numbers:
        rows = rows_of(found[f"{tmp_path}/metadata/metadata_{number}.parquet"])
        assert rows == [
            CaptionRow(f"text {number}-{row}", str(row), row + 1, "", vectors[number][row].tobytes())
            for row in range(3)
        ]


def test_embeddings_beside_metadata(tmp_path: Path) -> None:
    write_pair(tmp_path, "1", unit_rows(3), embeddings="embeddings/part-000")
    assert companions(tmp_path) == {"metadata/metadata_1.parquet": "embeddings/part-0001.npy"}
    (tmp_path / "embeddings" / "part-0001.npy").rename(tmp_path / "embeddings" / "all.npy")
    (tmp_path / "metadata" / "metadata_1.parquet").rename(tmp_path / "metadata" / "all.parquet")
    (tmp_path / "more.csv").write_text("caption\na\n")
    assert companions(tmp_path) == {"metadata/all.parquet": "embeddings/all.npy", "more.csv": None}


def test_the_references_datastore_whole_without_embeddings_and_empty(tmp_path: Path) -> None:
    vectors = unit_rows(3)
    write_datastore(tmp_path, vectors, ["a dog", 5, "a cat"])
    [dump] = find_dumps([str(tmp_path)])
    assert (dump.name, dump.embeddings) == ("coco_index_captions.json", f"{tmp_path}/coco_index")
    assert [row[:5] for row in rows_of(dump)] == [
        ("a dog", None, 1, "", vectors[0].tobytes()),
        ("", None, 2, "malformed", vectors[1].tobytes()),
        ("a cat", None, 3, "", vectors[2].tobytes()),
    ]
    [alone] = find_dumps([f"{tmp_path}/coco_index_captions.json"])
    assert [row[:5] for row in rows_of(alone)] == [(*row[:4], None) for row in rows_of(dump)]
    write_datastore(tmp_path / "empty", unit_rows(0), [])
    [dump] = find_dumps([f"{tmp_path}/empty"])
    assert rows_of(dump) == []


def test_folders_that_only_look_alike_are_read_as_before(tmp_path: Path) -> None:
    write_pair(tmp_path / "images", "0", unit_rows(2))
    (tmp_path / "images" / "text_emb" / "text_emb_0.npy").unlink()
    np.save(tmp_path / "images" / "features.npy", np.zeros(3))
    write_pair(tmp_path / "elsewhere", "0", unit_rows(2), embeddings="vectors/text_emb_")
    coco = {"images": [], "annotations": [{"image_id": 1, "caption": "a"}]}
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "train_captions.json").write_text(json.dumps(coco))
    (tmp_path / "coco" / "train").write_text("no index")
    (tmp_path / "coco" / "val_captions.json").write_text(json.dumps(coco))
    for name, count in (("images", 1), ("elsewhere", 1), ("coco", 2)):
        assert list(companions(tmp_path / name).values()) == [None] * count
        for dump in find_dumps([f"{tmp_path}/{name}"]):
            assert all(row.vector is None and not row.problem for row in rows_of(dump))


def test_a_pair_named_twice_keeps_its_embeddings(tmp_path: Path) -> None:
    write_pair(tmp_path, "0", unit_rows(2))
    [dump] = find_dumps([str(tmp_path), f"{tmp_path}/metadata/*.parquet"])
    assert dump.embeddings is not None
    [alone] = find_dumps([f"{tmp_path}/metadata"])
    assert alone.embeddings is None


@pytest.mark.parametrize("missing", ["text_emb/text_emb_1.npy", "metadata/metadata_1.parquet"])
def test_a_missing_half_is_named(tmp_path: Path, missing: str) -> None:
    for number in ("0", "1"):
        write_pair(tmp_path, number, unit_rows(2))
    (tmp_path / missing).unlink()
    other = "metadata/metadata_1.parquet" if missing.startswith("text") else "text_emb/text_emb_1.npy"
    with pytest.raises(ConfigError, match=rf"do not pair up(.|\n)*found: {other}"):
        find_dumps([str(tmp_path)])
    write_pair(tmp_path, "1", unit_rows(2))
    np.save(tmp_path / "text_emb" / "text_emb_01.npy", unit_rows(2))
    with pytest.raises(ConfigError, match="do not pair up"):
        find_dumps([str(tmp_path)])  # two files have one number


def test_checksum_covers_both_files(tmp_path: Path) -> None:
    scans = []
    for seed, extra in ((0, ""), (1, ""), (0, ""), (0, "more")):
        write_pair(tmp_path, "0", unit_rows(2, seed=seed))
        if extra:
            table = pa.table({"caption": ["a", "b"], "image_path": ["c", extra]})
            pq.write_table(table, tmp_path / "metadata" / "metadata_0.parquet")
        [dump] = find_dumps([str(tmp_path)])
        scans.append(scan_dump((dump, COLUMNS)))
    assert scans[0] == scans[2]
    assert len({scan.sha256 for scan in scans}) == 3
    assert scans[-1].bytes == sum(
        (tmp_path / name).stat().st_size for name in ("metadata/metadata_0.parquet", "text_emb/text_emb_0.npy")
    )


def test_remote_pairs(tmp_path: Path, s3: str) -> None:
    write_pair(tmp_path / "pair", "0", unit_rows(2))
    write_datastore(tmp_path / "store", unit_rows(2), ["a", "b"])
    for path in tmp_path.rglob("*"):
        if path.is_file():
            storage.upload(path, f"{s3}/dump/{path.relative_to(tmp_path)}")
    for name in ("pair", "store"):
        [local], [remote] = find_dumps([f"{tmp_path}/{name}"]), find_dumps([f"{s3}/dump/{name}/"])
        assert rows_of(remote) == rows_of(local)
        assert all(row.vector for row in rows_of(remote))
        assert scan_dump((remote, COLUMNS)).sha256 == scan_dump((local, COLUMNS)).sha256


def test_vectors_without_direction_are_counted_and_others_normalised(tmp_path: Path) -> None:
    vectors = np.array([[3, 4], [0, 0], [np.nan, 1], [np.inf, 1], [1, 0]], np.float64)
    write_pair(tmp_path, "0", vectors)
    rows = rows_of(find_dumps([str(tmp_path)])[0])
    assert [row.problem for row in rows] == ["", "bad_embedding", "bad_embedding", "bad_embedding", ""]
    assert rows[0].vector == np.array([0.6, 0.8], "<f4").tobytes()
    assert rows[4].vector == np.array([1, 0], "<f4").tobytes()


def archive() -> bytes:
    file = io.BytesIO()
    np.savez(file, unit_rows(2))
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (unit_rows(3), r"not have one embedding for each caption(.|\n)*2 embeddings(.|\n)*found: 3"),
        (unit_rows(2, dim=5), r"wrong length(.|\n)*4 numbers(.|\n)*found: 5"),
        (np.zeros(2), r"wrong shape or type(.|\n)*found: \[2\] of float64"),
        (np.zeros((2, 4, 1)), "wrong shape or type"),
        (np.zeros((2, 4), int), r"wrong shape or type(.|\n)*int64"),
        (np.zeros((2, 4), complex), "wrong shape or type"),
        (np.zeros((2, 0), np.float32), "wrong length"),
        (np.array([[1, "a"]], object), r"not a \.npy file of numbers"),
        (archive(), r"not a \.npy file of numbers"),
        (b"", r"not a \.npy file of numbers"),
        (b"garbage" * 100, r"not a \.npy file of numbers"),
        (None, r"not a \.npy file of numbers"),  # the last byte is missing
    ],
)
def test_npy_files_that_cannot_be_used(tmp_path: Path, content: np.ndarray | bytes | None, message: str) -> None:
    write_pair(tmp_path, "0", unit_rows(2))
    [dump] = find_dumps([str(tmp_path)])
    path = tmp_path / "text_emb" / "text_emb_0.npy"
    if isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        path.write_bytes(path.read_bytes()[:-1] if content is None else content)
    with pytest.raises(SchemaError, match=message) as raised:
        scan_dump((dump, COLUMNS._replace(dim=4)))
    assert raised.value.where == str(path)


@pytest.mark.parametrize(
    ("index", "captions", "error", "message"),
    [
        (None, ["a"], SchemaError, r"not have one embedding for each caption(.|\n)*1 embeddings(.|\n)*found: 2"),
        (None, ["a", "b", "c"], SchemaError, "not have one embedding for each caption"),
        (faiss.IndexFlatL2(4), ["a", "b"], IndexIntegrityError, r"cannot be imported(.|\n)*IxF2"),
        (faiss.IndexHNSWFlat(4, 2), ["a", "b"], IndexIntegrityError, r"cannot be imported(.|\n)*IHNf"),
        (faiss.IndexFlatIP(5), ["a", "b"], SchemaError, r"wrong length(.|\n)*4 numbers(.|\n)*found: 5"),
    ],
)
def test_datastores_that_cannot_be_used(
    tmp_path: Path, index: faiss.Index | None, captions: list[str], error: type[Exception], message: str
) -> None:
    write_datastore(tmp_path, unit_rows(2, dim=4 if index is None else index.d), captions, index)
    [dump] = find_dumps([str(tmp_path)])
    with pytest.raises(error, match=message):
        scan_dump((dump, COLUMNS._replace(dim=4)))


def test_damaged_datastores_are_errors_and_no_faults(tmp_path: Path) -> None:
    write_datastore(tmp_path, unit_rows(4), ["a", "b", "c", "d"])
    [dump] = find_dumps([str(tmp_path)])
    path = tmp_path / "coco_index"
    whole = path.read_bytes()
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        with pytest.raises(IndexIntegrityError):
            rows_of(dump)
    random = Random(0)
    for position in [*range(4, 45)] * 5:
        path.write_bytes(whole[:position] + random.randbytes(1) + whole[position + 1 :])
        with suppress(IndexIntegrityError, SchemaError):
            rows_of(dump)
    path.write_bytes(whole)
    for content in (b"[1", b"[" * 100_000, b'["caf\xe9"]'):
        (tmp_path / "coco_index_captions.json").write_bytes(content)
        with pytest.raises(SchemaError, match="not a JSON file"):
            rows_of(dump)
    (tmp_path / "coco_index_captions.json").write_bytes(b"{}")
    with pytest.raises(SchemaError, match="not a list of captions"):
        rows_of(dump)


def test_damaged_npy_headers_are_errors_and_no_faults(tmp_path: Path) -> None:
    write_pair(tmp_path, "0", unit_rows(2))
    [dump] = find_dumps([str(tmp_path)])
    path = tmp_path / "text_emb" / "text_emb_0.npy"
    whole = path.read_bytes()
    random = Random(0)
    for _ in range(300):
        position = random.randrange(80)
        path.write_bytes(whole[:position] + random.randbytes(1) + whole[position + 1 :])
        with suppress(SchemaError):
            rows_of(dump)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    write_pair(tmp_path, "0", unit_rows(20_000, dim=256))
    [dump] = find_dumps([str(tmp_path)])
    tracemalloc.start()
    with open_dump(dump, CaptionColumns("caption")) as rows:
        assert sum(len(row.vector or b"") for row in rows) == 20_000 * 256 * 4
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12_000_000  # of 20 MB
