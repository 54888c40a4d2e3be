import pyarrow as pa
import pytest

from smallcap.errors import SchemaError
from smallcap.schema import CAPTION_COLUMNS, caption_schema, check_caption_schema

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


def test_version_1_has_these_columns() -> None:
    assert {field.name: str(field.type) for field in CAPTION_COLUMNS} == VERSION_1
    assert [field.name for field in CAPTION_COLUMNS if not field.nullable] == ["image_id", "status"]


def test_parts_carry_the_ids_of_their_run() -> None:
    schema = caption_schema("run", "model", "index")
    assert schema.metadata == {
        b"smallcap.schema_version": b"1",
        b"smallcap.run_id": b"run",
        b"smallcap.model_id": b"model",
        b"smallcap.index_id": b"index",
    }
    check_caption_schema(schema, "part.parquet")


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (CAPTION_COLUMNS, "not a part of a captioning run"),
        (CAPTION_COLUMNS.with_metadata({b"smallcap.schema_version": b"2"}), "unknown schema version"),
        (pa.schema([("image_id", pa.string())], {b"smallcap.schema_version": b"1"}), "columns are not those"),
    ],
)
def test_other_files_are_refused(schema: pa.Schema, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        check_caption_schema(schema, "s3://bucket/part.parquet")
