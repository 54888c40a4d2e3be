import pyarrow as pa
import pytest

from smallcap.errors import ConfigError, SchemaError
from smallcap.output.schema import CAPTION_COLUMNS, caption_schema, check_caption_schema, kept_columns

# Written out once more, so that a change of the code cannot change both: this is the promise of schema version 1.
COLUMNS = {
    "image_id": "string",
    "image_uri": "string",
    "width": "int32",
    "height": "int32",
    "caption": "string",
    "caption_logprob": "float",
    "caption_tokens": "int16",
    "clip_score": "float",
    "alternatives": "list<item: struct<caption: string, logprob: float, tokens: int16>>",
    "neighbours": "list<item: struct<caption_id: int64, text: string, score: float, sources: list<item: string>>>",
    "copied_share": "float",
    "neighbour_agreement": "float",
    "retrieval_score": "float",
    "alt_clip_score": "float",
    "best_caption": "string",
    "status": "string",
    "error_code": "string",
    "error_message": "string",
}


def test_parts_have_these_columns_and_the_ids_of_their_run() -> None:
    schema = caption_schema("run", "model", "index")
    assert {field.name: str(field.type) for field in schema} == COLUMNS
    assert [field.name for field in schema if not field.nullable] == ["image_id", "status"]
    check_caption_schema(schema, "part.parquet")
    ids = {"schema_version": b"1", "run_id": b"run", "model_id": b"model", "index_id": b"index", "kept_columns": b"[]"}
    assert schema.metadata == {f"smallcap.{name}".encode(): value for name, value in ids.items()}


def test_kept_columns_follow_the_fixed_ones_without_the_inputs_flags() -> None:
    kept = pa.schema([pa.field("split", pa.string(), nullable=False, metadata={"a": "b"}), ("année", pa.int16())])
    schema = caption_schema("run", "model", "index", kept_columns=kept)
    assert schema.names == [*COLUMNS, "split", "année"]
    assert schema.field("split").equals(pa.field("split", pa.string()), check_metadata=True)
    assert kept_columns(schema) == ["split", "année"]
    check_caption_schema(schema, "part.parquet")


@pytest.mark.parametrize(
    "names", [["caption"], ["embedding"], ["image_bytes"], ["logprob"], ["split", "split"], ["smallcap.fragment"]]
)
def test_kept_columns_that_would_collide_are_refused(names: list[str]) -> None:
    with pytest.raises(ConfigError, match=rf"found: {names[0]}\n"):
        caption_schema("run", "model", "index", kept_columns=pa.schema([(name, pa.string()) for name in names]))


def part_schema(kept: bytes) -> pa.Schema:
    return CAPTION_COLUMNS.with_metadata({b"smallcap.schema_version": b"1", b"smallcap.kept_columns": kept})


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (CAPTION_COLUMNS, "not a part of a captioning run"),
        (CAPTION_COLUMNS.with_metadata({b"smallcap.schema_version": b"2"}), "unknown schema version"),
        (part_schema(kept=b"[]").remove(8), "columns of this part contradict"),
        (part_schema(kept=b"[]").remove(10), "columns of this part contradict"),
        (part_schema(kept=b'["split"]'), "columns of this part contradict"),
        (part_schema(kept=b"[]").append(pa.field("split", pa.string())), "columns of this part contradict"),
        (part_schema(kept=b"split"), "list of kept columns is damaged"),
        (CAPTION_COLUMNS.with_metadata({b"smallcap.schema_version": b"1"}), "list of kept columns is damaged"),
    ],
)
def test_other_files_are_refused(schema: pa.Schema, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        check_caption_schema(schema, "s3://bucket/part.parquet")
