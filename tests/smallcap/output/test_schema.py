import pyarrow as pa
import pytest

from smallcap.errors import ConfigError, SchemaError
from smallcap.output.schema import (
    CAPTION_COLUMNS,
    caption_schema,
    check_caption_schema,
    kept_columns,
    to_newest_version,
)

# Written out once more, so that a change of the code cannot change both: this is the promise of schema version 1.
VERSION_1 = {
    "image_id": "string",
    "image_uri": "string",
    "width": "int32",
    "height": "int32",
    "caption": "string",
    "caption_logprob": "float",
    "caption_tokens": "int16",
    "clip_score": "float",
    "neighbours": "list<item: struct<caption_id: int64, text: string, score: float>>",
    "status": "string",
    "error_code": "string",
    "error_message": "string",
}


# Version 2 adds one column before `neighbours`.
VERSION_2 = {
    **{name: VERSION_1[name] for name in list(VERSION_1)[:8]},
    "alternatives": "list<item: struct<caption: string, logprob: float, tokens: int16>>",
    **{name: VERSION_1[name] for name in list(VERSION_1)[8:]},
}


@pytest.mark.parametrize(("version", "columns"), [(1, VERSION_1), (2, VERSION_2), (3, VERSION_2)])
def test_each_version_has_these_columns(version: int, columns: dict[str, str]) -> None:
    schema = caption_schema("run", "model", "index", version)
    assert {field.name: str(field.type) for field in schema} == columns
    assert [field.name for field in schema if not field.nullable] == ["image_id", "status"]
    check_caption_schema(schema, "part.parquet")


def test_parts_carry_the_ids_of_their_run() -> None:
    schema = caption_schema("run", "model", "index")
    assert schema.metadata == {
        b"smallcap.schema_version": b"3",
        b"smallcap.run_id": b"run",
        b"smallcap.model_id": b"model",
        b"smallcap.index_id": b"index",
        b"smallcap.kept_columns": b"[]",
    }


def test_kept_columns_follow_the_fixed_ones_without_the_inputs_flags() -> None:
    kept = pa.schema([pa.field("split", pa.string(), nullable=False, metadata={"a": "b"}), ("année", pa.int16())])
    schema = caption_schema("run", "model", "index", kept_columns=kept)
    assert schema.names == [*VERSION_2, "split", "année"]
    assert schema.field("split").equals(pa.field("split", pa.string()), check_metadata=True)
    assert kept_columns(schema) == ["split", "année"]
    check_caption_schema(schema, "part.parquet")
    table = pa.table({field.name: pa.nulls(2, field.type) for field in reversed(list(schema))})
    assert to_newest_version(table).column_names == [*VERSION_2, "année", "split"]


@pytest.mark.parametrize(
    "names", [["caption"], ["embedding"], ["image_bytes"], ["logprob"], ["split", "split"], ["smallcap.fragment"]]
)
def test_kept_columns_that_would_collide_are_refused(names: list[str]) -> None:
    with pytest.raises(ConfigError, match=rf"found: {names[0]}\n"):
        caption_schema("run", "model", "index", kept_columns=pa.schema([(name, pa.string()) for name in names]))


def test_versions_before_3_keep_no_columns() -> None:
    with pytest.raises(SchemaError, match="older smallcap"):
        caption_schema("run", "model", "index", 2, pa.schema([("split", pa.string())]))
    assert kept_columns(caption_schema("run", "model", "index", 2)) == []


def test_rows_of_version_1_read_as_the_newest() -> None:
    old = caption_schema("run", "model", "index", 1)
    table = pa.table({field.name: pa.nulls(2, field.type) for field in old})
    newest = to_newest_version(table)
    assert newest.column_names == list(VERSION_2)
    assert newest["alternatives"].null_count == 2


def version_3(kept: bytes) -> pa.Schema:
    return CAPTION_COLUMNS.with_metadata({b"smallcap.schema_version": b"3", b"smallcap.kept_columns": kept})


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (CAPTION_COLUMNS, "not a part of a captioning run"),
        (CAPTION_COLUMNS.with_metadata({b"smallcap.schema_version": b"4"}), "unknown schema version"),
        (pa.schema([("image_id", pa.string())], {b"smallcap.schema_version": b"1"}), "columns are not those"),
        (version_3(kept=b'["split"]'), "columns are not those"),
        (version_3(kept=b"[]").append(pa.field("split", pa.string())), "columns are not those"),
        (version_3(kept=b"split"), "list of kept columns is damaged"),
    ],
)
def test_other_files_are_refused(schema: pa.Schema, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        check_caption_schema(schema, "s3://bucket/part.parquet")
