"""The columns of a captioning run's Parquet parts: schema v1, its metadata, and its reader's check.

The authority is docs/formats.md. A change here raises `SCHEMA_VERSION`, keeps reading the old one, and gets a CHANGELOG
heading.
"""

from __future__ import annotations

import pyarrow as pa

from smallcap.errors import SchemaError

SCHEMA_VERSION = 1
STATUS_OK = "ok"
STATUS_ERROR = "error"

NEIGHBOUR_TYPE = pa.struct(
    [
        pa.field("caption_id", pa.int64()),
        pa.field("text", pa.string()),
        pa.field("score", pa.float32()),  # cosine of image and caption
    ]
)

CAPTION_COLUMNS = pa.schema(
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

_VERSION_KEY = b"smallcap.schema_version"


def caption_schema(run_id: str, model_id: str, index_id: str) -> pa.Schema:
    """Returns schema v1 with the file metadata every part carries."""
    return CAPTION_COLUMNS.with_metadata(
        {
            _VERSION_KEY: str(SCHEMA_VERSION).encode(),
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
    if version != str(SCHEMA_VERSION).encode():
        raise SchemaError(
            "This part has an unknown schema version.",
            where=where,
            expected=str(SCHEMA_VERSION),
            found=version.decode(),
            remedy="Read it with the smallcap release that wrote it, or a newer one.",
        )
    if not schema.equals(CAPTION_COLUMNS, check_metadata=False):
        raise SchemaError(
            "This part's columns are not those of its schema version.",
            where=where,
            expected=", ".join(CAPTION_COLUMNS.names),
            found=", ".join(schema.names),
        )
