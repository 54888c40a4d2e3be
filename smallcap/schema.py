"""The columns of a captioning run's Parquet parts: their versions, metadata, and the reader's check.

All parts of a run have the version that the run began with; readers know all versions.

The authority is docs/formats.md. A change here raises `SCHEMA_VERSION`, keeps reading the old one, and gets a CHANGELOG
heading.
"""

from __future__ import annotations

import pyarrow as pa

from smallcap.errors import SchemaError

SCHEMA_VERSION = 2
STATUS_OK = "ok"
STATUS_ERROR = "error"

NEIGHBOUR_TYPE = pa.struct(
    [
        pa.field("caption_id", pa.int64()),
        pa.field("text", pa.string()),
        pa.field("score", pa.float32()),  # cosine of image and caption
    ]
)

ALTERNATIVE_TYPE = pa.struct(
    [
        pa.field("caption", pa.string()),
        pa.field("logprob", pa.float32()),  # natural log, summed over the caption's tokens
        pa.field("tokens", pa.int16()),  # generated tokens, the eos included
    ]
)

_VERSION_1 = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("image_uri", pa.string()),
        pa.field("width", pa.int32()),  # px, after EXIF rotation
        pa.field("height", pa.int32()),  # px, after EXIF rotation
        pa.field("caption", pa.string()),
        pa.field("caption_logprob", pa.float32()),  # natural log, summed over the caption's tokens
        pa.field("caption_tokens", pa.int16()),  # generated tokens, the eos included
        pa.field("clip_score", pa.float32()),  # cosine of image and generated caption
        pa.field("neighbours", pa.list_(NEIGHBOUR_TYPE)),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error_code", pa.string()),
        pa.field("error_message", pa.string()),
    ]
)

# Version 2 adds the further captions of an image.
CAPTION_COLUMNS = _VERSION_1.insert(8, pa.field("alternatives", pa.list_(ALTERNATIVE_TYPE)))
_COLUMNS = {1: _VERSION_1, 2: CAPTION_COLUMNS}

_VERSION_KEY = b"smallcap.schema_version"


def caption_schema(run_id: str, model_id: str, index_id: str, version: int = SCHEMA_VERSION) -> pa.Schema:
    """Returns a schema version's columns with the file metadata that every part carries."""
    return _COLUMNS[version].with_metadata(
        {
            _VERSION_KEY: str(version).encode(),
            b"smallcap.run_id": run_id.encode(),
            b"smallcap.model_id": model_id.encode(),
            b"smallcap.index_id": index_id.encode(),
        }
    )


def check_caption_schema(schema: pa.Schema, where: str) -> None:
    """Checks that a Parquet part can be read as a caption part of a known version.

    Raises:
        SchemaError: It was not written by smallcap, or by a newer release, or its columns differ.
    """
    version = (schema.metadata or {}).get(_VERSION_KEY)
    if version is None:
        raise SchemaError(
            "This Parquet file is not a part of a captioning run.",
            where=where,
            expected="file metadata smallcap.schema_version",
            found="none",
            remedy="Give the run its own empty output folder.",
        )
    if version not in {str(known).encode() for known in _COLUMNS}:
        raise SchemaError(
            "This part has an unknown schema version.",
            where=where,
            expected=" or ".join(map(str, _COLUMNS)),
            found=version.decode(),
            remedy="Read it with the smallcap release that wrote it, or a newer one.",
        )
    columns = _COLUMNS[int(version)]
    if not schema.equals(columns, check_metadata=False):
        raise SchemaError(
            "This part's columns are not those of its schema version.",
            where=where,
            expected=", ".join(columns.names),
            found=", ".join(schema.names),
        )


def to_newest_version(table: pa.Table) -> pa.Table:
    """Returns rows of any version with the newest version's columns; what an older one lacks is null."""
    missing = [field for field in CAPTION_COLUMNS if field.name not in table.column_names]
    for field in missing:
        table = table.append_column(field, pa.nulls(len(table), field.type))
    return table.select(CAPTION_COLUMNS.names)
