"""Parts and their sidecars, read back by this library and by the readers that people have."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smallcap import storage
from smallcap.errors import SchemaError
from smallcap.images.row_ranges import RowRanges
from smallcap.output.part_files import (
    PartInfo,
    PartOptions,
    drop_rows,
    list_parts,
    read_part_infos,
    remove_orphans,
    rename_rows,
    write_part,
)
from smallcap.output.schema import (
    CAPTION_COLUMNS,
    FRAGMENT,
    FRAGMENT_ROW,
    PLACE_COLUMNS,
    caption_schema,
    check_caption_schema,
    kept_columns,
)

KEPT = pa.schema([("split", pa.string()), ("score", pa.float64())])
SCHEMA = caption_schema("run", "model", "index", kept_columns=KEPT)
DIM = 8
SIDECARS = PartOptions(rows_per_row_group=2, embeddings=True, webdataset=True)
NAME = "part-000-000000.parquet"
JPEG = b"\xff\xd8\xff\xe0 and the rest"


def row(image_id: str, error: str | None = None) -> dict[str, Any]:
    common = {"image_id": image_id, "image_uri": f"s3://images/{image_id}", "split": "train", "score": 0.5}
    if error:
        return common | {"status": "error", "error_code": error, "error_message": error, "image_bytes": None}
    neighbour = {"caption_id": 7, "text": "a red car", "score": 0.5, "sources": ["cars.csv"]}
    captioned = {"width": 4, "height": 3, "caption": f"a photo of {image_id}", "caption_logprob": -1.5}
    captioned |= {"caption_tokens": 5, "clip_score": 0.25, "neighbours": [neighbour], "alternatives": []}
    return common | captioned | {"status": "ok", "image_bytes": JPEG, "embedding": embedding_of(image_id)}


def embedding_of(image_id: str) -> np.ndarray:
    return np.random.default_rng(len(image_id) + ord(image_id[0])).normal(size=DIM).astype(np.float32)


def table_of(rows: list[dict[str, Any]], embedding: pa.DataType | None = None) -> pa.Table:
    fields = [pa.field("image_bytes", pa.binary()), pa.field("embedding", embedding or pa.list_(pa.float32(), DIM))]
    places = [pa.field(name, pa.int32()) for name in PLACE_COLUMNS]
    placed = [one | {FRAGMENT: 3, FRAGMENT_ROW: number} for number, one in enumerate(rows)]
    return pa.Table.from_pylist(placed, schema=pa.schema([*SCHEMA, *fields, *places]))


ROWS = [row("d.jpg"), row("b.jpg"), row("c.jpg", "truncated"), row("a.jpg"), row("e.jpg")]
INFO = PartInfo({3: RowRanges([(0, 4)]), 5: RowRanges([(7, 8)])}, {3: RowRanges([(2, 3)])}, (3,), 4, {"truncated": 1})


def write(out: str, name: str = NAME, rows: list[dict[str, Any]] | None = None) -> None:
    write_part(out, name, table_of(ROWS if rows is None else rows), INFO, SCHEMA, SIDECARS)


def read_table(*names: str) -> pa.Table:
    return pq.read_table(io.BytesIO(storage.read_bytes(storage.join(*names))))


def tar_names(uri: str) -> list[str]:
    with storage.open_ranged(uri) as file, tarfile.open(fileobj=file) as tar:
        return tar.getnames()


def test_a_part_and_its_sidecars_are_read_as_they_were_written(anywhere: str) -> None:
    write(anywhere)
    data = storage.read_bytes(storage.join(anywhere, NAME))
    table = pq.read_table(io.BytesIO(data))
    check_caption_schema(table.schema, NAME)
    assert table["image_id"].to_pylist() == ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"]
    expected = table_of(sorted(ROWS, key=lambda r: r["image_id"])).select(SCHEMA.names)
    assert table.to_pylist() == expected.to_pylist()
    metadata = pq.read_metadata(io.BytesIO(data))
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [2, 2, 1]
    assert metadata.row_group(0).column(0).statistics.max == "b.jpg"
    assert metadata.row_group(0).column(0).has_offset_index
    assert metadata.row_group(0).sorting_columns[0].column_index == 0
    assert list(read_part_infos(anywhere)) == [(NAME, INFO)]
    # The sidecars have the part's name, and only captioned images.
    embeddings = read_table(anywhere, "_embeddings", NAME)
    assert embeddings["embedding"].type == pa.list_(pa.float32(), DIM)
    assert embeddings.schema.metadata[b"smallcap.model_id"] == b"model"
    assert embeddings["image_id"].to_pylist() == ["a.jpg", "b.jpg", "d.jpg", "e.jpg"]
    assert embeddings["fragment"].to_pylist() == [3] * 4
    assert embeddings["fragment_row"].to_pylist() == [3, 1, 0, 4]
    for found, image_id in zip(embeddings["embedding"].to_pylist(), embeddings["image_id"].to_pylist(), strict=True):
        np.testing.assert_array_equal(np.array(found, np.float32), embedding_of(image_id))
    tar = storage.join(anywhere, "_webdataset", "part-000-000000.tar")
    assert tar_names(tar) == [f"{key}.{end}" for key in "abde" for end in ("jpg", "txt", "json")]
    with storage.open_ranged(tar) as file, tarfile.open(fileobj=file) as opened:
        contents = {name: opened.extractfile(name).read() for name in ("a.jpg", "a.txt", "a.json")}  # type: ignore[union-attr]
    assert contents["a.jpg"] == JPEG
    assert contents["a.txt"] == b"a photo of a.jpg"
    names = ("image_id", "image_uri", "width", "height", "caption", "neighbours", "split", "score")
    assert json.loads(contents["a.json"]) == {name: ROWS[3][name] for name in names} | {"logprob": -1.5}


def test_lists_without_a_fixed_size_columns_in_pieces_and_errors_alone_are_taken(tmp_path: Path) -> None:
    write(str(tmp_path), rows=[row("a.jpg", "empty")])
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [NAME]
    table = table_of(ROWS, pa.list_(pa.float32()))
    table = pa.concat_tables([table.slice(0, 2), table.slice(2)])
    write_part(str(tmp_path), NAME, table, INFO, SCHEMA, SIDECARS)
    embeddings = pq.read_table(tmp_path / "_embeddings" / NAME)
    assert embeddings["embedding"].type == pa.list_(pa.float32(), DIM)
    assert tar_names(str(tmp_path / "_webdataset" / "part-000-000000.tar"))[0] == "a.jpg"


def test_the_part_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(storage, "write_bytes", lambda uri, data: written.append(uri))
    monkeypatch.setattr(storage, "move_in", lambda path, uri: written.append(uri))
    write("OUT")
    assert written == [f"OUT/_embeddings/{NAME}", "OUT/_webdataset/part-000-000000.tar", f"OUT/{NAME}"]


def test_dropped_rows_leave_the_part_and_its_sidecars(anywhere: str) -> None:
    write(anywhere)
    write(anywhere, "part-001-000000.parquet")
    left = PartInfo({3: RowRanges([(0, 1)])}, {}, (), 1, {})
    drop_rows(anywhere, NAME, pa.array(["a.jpg", "b.jpg", "c.jpg", "nobody"]), left)
    table = read_table(anywhere, NAME)
    check_caption_schema(table.schema, NAME)
    assert table.schema.metadata[b"smallcap.run_id"] == b"run"
    assert table["image_id"].to_pylist() == ["d.jpg", "e.jpg"]
    embeddings = read_table(anywhere, "_embeddings", NAME)
    assert embeddings["image_id"].to_pylist() == ["d.jpg", "e.jpg"]
    assert tar_names(storage.join(anywhere, "_webdataset", "part-000-000000.tar"))[::3] == ["d.jpg", "e.jpg"]
    assert dict(read_part_infos(anywhere)) == {NAME: left, "part-001-000000.parquet": INFO}
    drop_rows(anywhere, NAME, pa.array(["d.jpg", "e.jpg"]), PartInfo())
    assert not storage.exists(storage.join(anywhere, "_embeddings", NAME))
    assert not storage.exists(storage.join(anywhere, "_webdataset", "part-000-000000.tar"))
    assert [uri.rsplit("/", 1)[-1] for uri in list_parts(anywhere)] == ["part-001-000000.parquet"]


def test_rows_get_new_ids_in_the_part_and_its_sidecars(anywhere: str) -> None:
    write(anywhere)
    for _ in range(2):  # as after an interruption
        rename_rows(anywhere, NAME, {"a.jpg": "x/a.jpg"})
        table = read_table(anywhere, NAME)
        check_caption_schema(table.schema, NAME)
        ids = table["image_id"].to_pylist()
        assert ids == sorted(ids)
        assert "x/a.jpg" in ids
        assert "a.jpg" not in ids
        assert table["image_uri"].to_pylist()[ids.index("x/a.jpg")] == "s3://images/a.jpg"
        embeddings = {
            row["image_id"]: row["embedding"] for row in read_table(anywhere, "_embeddings", NAME).to_pylist()
        }
        assert np.array_equal(embeddings["x/a.jpg"], embedding_of("a.jpg"))
        assert tar_names(storage.join(anywhere, "_webdataset", "part-000-000000.tar"))[0] == "a.jpg"
        assert dict(read_part_infos(anywhere)) == {NAME: INFO}


def test_a_drop_that_was_stopped_before_the_part_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, gone = str(tmp_path), pa.array(["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"])
    write(out)
    with monkeypatch.context() as patch:
        patch.setattr("smallcap.output.part_files.with_info", None)  # the last step: what remains is not written
        patch.setattr(storage, "remove", lambda uri: None if uri.endswith(f"out/{NAME}") else _remove(uri))
        with pytest.raises(TypeError):
            drop_rows(out, NAME, gone.slice(0, 4), INFO)
    assert len(pq.read_table(tmp_path / NAME)) == 5
    drop_rows(out, NAME, gone, PartInfo())
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


def _remove(uri: str) -> None:
    Path(uri).unlink(missing_ok=True)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1 and nothing more", b"x" * 100_000 + b"PAR1"])
def test_a_damaged_part_is_named_with_its_remedy(anywhere: str, content: bytes) -> None:
    storage.write_bytes(storage.join(anywhere, NAME), content)
    with pytest.raises(SchemaError, match=f"(?s){NAME}.*Delete the part"):
        list(read_part_infos(anywhere))
    with pytest.raises(SchemaError, match=f"(?s){NAME}.*Delete the part"):
        drop_rows(anywhere, NAME, pa.array(["a"]), PartInfo())


@pytest.mark.parametrize("said", [b"", b"{", b"[]", b'{"rows": {"a": [[0, 1]]}}', b'{"rows": {"1": [0, 1, 2]}}'])
def test_nonsense_of_a_parts_rows_is_refused(tmp_path: Path, said: bytes) -> None:
    rows = pa.Table.from_pylist([{"image_id": "a", "status": "ok"}], schema=SCHEMA)
    pq.write_table(rows.replace_schema_metadata({**SCHEMA.metadata, b"smallcap.part": said}), tmp_path / NAME)
    with pytest.raises(SchemaError, match=f"(?s){NAME}.*Delete the part"):
        list(read_part_infos(str(tmp_path)))


def test_a_footer_larger_than_the_first_read_is_read_whole(anywhere: str) -> None:
    info = PartInfo({n: RowRanges([(2 * i, 2 * i + 1) for i in range(100)]) for n in range(200)}, {}, (), 20_000, {})
    assert len(info.to_json()) > 2 * (64 << 10)
    write_part(anywhere, NAME, table_of(ROWS), info, SCHEMA)
    assert list(read_part_infos(anywhere)) == [(NAME, info)]


def test_parts_are_listed_from_the_folder_itself_oldest_attempt_first(anywhere: str) -> None:
    assert list_parts(anywhere) == []
    for name in ("part-001-000000.parquet", "part-000-000001.parquet", "_work/part-000-000000.parquet", "_run.json"):
        storage.write_bytes(storage.join(anywhere, name), b"x")
    storage.write_bytes(storage.join(anywhere, ".part-000-000002.parquet.0123"), b"x")
    assert [uri.rsplit("/", 1)[-1] for uri in list_parts(anywhere)] == [
        "part-000-000001.parquet",
        "part-001-000000.parquet",
    ]
    assert list_parts(anywhere)[0] == storage.join(anywhere, "part-000-000001.parquet")


def test_sidecars_without_a_part_are_removed(anywhere: str) -> None:
    write(anywhere)
    write(anywhere, "part-000-000001.parquet")
    storage.remove(storage.join(anywhere, "part-000-000001.parquet"))
    orphans = remove_orphans(anywhere)
    names = ("_embeddings/part-000-000001.parquet", "_webdataset/part-000-000001.tar")
    assert orphans == [storage.join(anywhere, name) for name in names]
    assert not any(storage.exists(uri) for uri in orphans)
    assert storage.exists(storage.join(anywhere, "_embeddings", NAME))
    assert remove_orphans(anywhere) == []


def test_kept_strings_with_few_values_get_dictionaries(tmp_path: Path) -> None:
    kept = pa.schema([("split", pa.string()), ("title", pa.string())])
    schema = caption_schema("run", "model", "index", kept_columns=kept)
    rows = [{"image_id": str(i), "status": "ok", "split": "train", "title": f"title {i}"} for i in range(100)]
    write_part(str(tmp_path), NAME, pa.Table.from_pylist(rows, schema=schema), PartInfo(), schema)
    group = pq.read_metadata(tmp_path / NAME).row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    with_dictionary = {path for path, column in columns.items() if column.has_dictionary_page}
    assert with_dictionary == {"width", "height", "caption_tokens", "status", "error_code", "split"} | {
        "neighbours.list.element.sources.list.element"
    }
    assert {column.compression for column in columns.values()} == {"ZSTD"}


def test_the_golden_output_of_version_1_is_read() -> None:
    folder, name = Path(__file__).parents[2] / "golden" / "run_v1", "part-001-000000.parquet"
    info = PartInfo({0: RowRanges([(0, 3)])}, {0: RowRanges([(2, 3)])}, (0,), 2, {"not_an_image": 1})
    assert list(read_part_infos(str(folder))) == [(name, info)]
    table = pq.read_table(folder / name)
    check_caption_schema(table.schema, name)
    assert kept_columns(table.schema) == ["split", "licence"]
    assert table.schema.metadata[b"smallcap.part"] == (
        b'{"rows":{"0":[[0,3]]},"failed":{"0":[[2,3]]},"ends":[0],"ok":2,"errors":{"not_an_image":1},"left_out":{}}'
    )
    first, _, broken = table.to_pylist()
    assert (first["image_id"], first["caption_tokens"], first["split"]) == ("10000000.jpg", 13, "test")
    assert first["caption"] == "a rocket and a dog above a tractor on a yellow background"
    assert first["alternatives"][0]["caption"] == "a rocket and a dog above a tractor on a yellow ground"
    assert [neighbour["caption_id"] for neighbour in first["neighbours"]] == [25, 1771, 2687, 2422]
    assert first["neighbours"][0]["text"] == "a house and a train on a yellow background"
    assert first["neighbours"][0]["score"] == pytest.approx(0.6890859)
    assert (broken["caption"], broken["error_code"], broken["licence"]) == (None, "not_an_image", 4)
    embeddings = pq.read_table(folder / "_embeddings" / name)
    assert embeddings["image_id"].to_pylist() == ["10000000.jpg", "10000001.jpg"]
    assert np.linalg.norm(np.array(embeddings["embedding"][1].as_py())) == pytest.approx(1, abs=0.01)
    assert tar_names(str(folder / "_webdataset" / "part-001-000000.tar")) == [
        f"1000000{number}.{end}" for number in (0, 1) for end in ("jpg", "txt", "json")
    ]


# ── the readers that people have ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def whole_output(tmp_path: Path) -> Path:
    """An output as a run leaves it: two parts, sidecars, the list of work, the record."""
    write(str(tmp_path))
    others = [row("f.jpg"), row("g.jpg"), row("h.jpg", "empty")]
    write(str(tmp_path), "part-001-000000.parquet", others)
    (tmp_path / "_work").mkdir()
    pq.write_table(pa.table({"image_uri": ["a"]}), tmp_path / "_work" / "list-000000.parquet")
    (tmp_path / "_run.json").write_text("{}")
    (tmp_path / ".lock").write_text("")
    return tmp_path


IDS = [f"{letter}.jpg" for letter in "abcdefgh"]
CAPTIONED = [f"{letter}.jpg" for letter in "abdefg"]


def test_the_output_as_a_whole_is_a_data_set_of_the_captions(whole_output: Path) -> None:
    import duckdb
    import pandas as pd
    import pyarrow.dataset

    assert {path.name for path in whole_output.iterdir()} > {
        "_run.json",
        "_work",
        "_embeddings",
        "_webdataset",
        ".lock",
    }
    assert pyarrow.dataset.dataset(whole_output).to_table()["image_id"].to_pylist() == IDS
    assert pq.read_table(whole_output)["image_id"].to_pylist() == IDS
    assert pd.read_parquet(whole_output)["image_id"].tolist() == IDS
    found = duckdb.sql(f"SELECT image_id FROM '{whole_output}/*.parquet' ORDER BY image_id").fetchall()
    assert [image_id for (image_id,) in found] == IDS


def test_pandas_reads_parts_and_embeddings(whole_output: Path) -> None:
    import pandas as pd

    parts = pd.concat(map(pd.read_parquet, sorted(whole_output.glob("part-*.parquet"))))
    assert parts["image_id"].tolist() == IDS
    assert parts["neighbours"].iloc[0][0]["text"] == "a red car"
    assert pd.read_parquet(sorted(map(str, whole_output.glob("part-*.parquet"))))["image_id"].tolist() == IDS
    embeddings = pd.read_parquet(whole_output / "_embeddings")  # a folder of nothing else can be given as it is
    assert embeddings["image_id"].tolist() == CAPTIONED
    matrix = np.stack(embeddings["embedding"].tolist())
    assert (matrix.dtype, matrix.shape) == (np.float32, (6, DIM))
    np.testing.assert_array_equal(matrix[0], embedding_of("a.jpg"))


def test_duckdb_reads_parts_and_embeddings(whole_output: Path) -> None:
    import duckdb

    parts = f"read_parquet('{whole_output}/part-*.parquet')"
    assert [r[0] for r in duckdb.sql(f"SELECT image_id FROM {parts} ORDER BY image_id").fetchall()] == IDS
    best = duckdb.sql(f"SELECT neighbours[1].text, count(*) FROM {parts} WHERE status = 'ok' GROUP BY 1").fetchall()
    assert best == [("a red car", 6)]
    query = f"""SELECT image_id, caption, embedding::FLOAT[{DIM}] FROM {parts} AS parts
        JOIN '{whole_output}/_embeddings/*.parquet' AS embeddings USING (image_id) ORDER BY image_id"""
    joined = duckdb.sql(query).fetchall()
    assert [r[0] for r in joined] == CAPTIONED
    np.testing.assert_array_equal(np.array(joined[0][2], np.float32), embedding_of("a.jpg"))


def test_duckdb_reads_only_the_row_groups_that_can_have_an_id(tmp_path: Path) -> None:
    import duckdb

    rows = [row(f"{i:06d}.jpg") for i in range(200)]
    write_part(str(tmp_path), NAME, table_of(rows), INFO, SCHEMA, PartOptions(rows_per_row_group=20))
    bounds = duckdb.sql(
        f"SELECT stats_min_value, stats_max_value FROM parquet_metadata('{tmp_path / NAME}')"
        " WHERE path_in_schema = 'image_id' ORDER BY row_group_id"
    ).fetchall()
    assert bounds[3] == ("000060.jpg", "000079.jpg")
    query = f"SELECT caption FROM read_parquet('{tmp_path / NAME}') WHERE image_id = '000070.jpg'"
    assert duckdb.sql(query).fetchall() == [("a photo of 000070.jpg",)]


@pytest.mark.ray
@pytest.mark.slow
def test_ray_reads_parts_embeddings_and_tars(whole_output: Path) -> None:
    import ray

    for given in (sorted(map(str, whole_output.glob("part-*.parquet"))), str(whole_output)):
        parts = ray.data.read_parquet(given).to_pandas()
        assert sorted(parts["image_id"]) == IDS
    embeddings = ray.data.read_parquet(str(whole_output / "_embeddings")).to_pandas()
    assert sorted(embeddings["image_id"]) == CAPTIONED
    found = dict(zip(embeddings["image_id"], embeddings["embedding"], strict=True))
    np.testing.assert_array_equal(np.asarray(found["a.jpg"], np.float32), embedding_of("a.jpg"))
    samples = ray.data.read_webdataset(str(whole_output / "_webdataset"), decoder=None).take_all()
    assert sorted(sample["__key__"] for sample in samples) == list("abdefg")
    first = min(samples, key=lambda sample: sample["__key__"])
    assert (first["jpg"], first["txt"]) == (JPEG, b"a photo of a.jpg")
    assert json.loads(first["json"])["image_id"] == "a.jpg"


@pytest.mark.ray
@pytest.mark.slow
def test_ray_reads_parts_from_s3(s3: str) -> None:
    import ray

    write(s3 + "/out")
    table = ray.data.read_parquet(list_parts(s3 + "/out")).to_pandas()
    assert sorted(table["image_id"]) == IDS[:5]
    assert list(table.columns) == [*CAPTION_COLUMNS.names, "split", "score"]
