"""The columns of a captioning run's Parquet parts: their metadata, and the reader's check.

Columns kept from the input follow the fixed ones; a part names them in its metadata, and its footer says what it holds
(`part_files`).

The authority is docs/formats.md. A change here raises `SCHEMA_VERSION` and gets a CHANGELOG heading.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import pyarrow as pa

from smallcap.errors import ConfigError, SchemaError

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

ALTERNATIVE_TYPE = pa.struct(
    [
        pa.field("caption", pa.string()),
        pa.field("logprob", pa.float32()),  # natural log, summed over the caption's tokens
        pa.field("tokens", pa.int16()),  # generated tokens, the eos included
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
        pa.field("alternatives", pa.list_(ALTERNATIVE_TYPE)),  # the image's further captions, best first
        pa.field("neighbours", pa.list_(NEIGHBOUR_TYPE)),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error_code", pa.string()),
        pa.field("error_message", pa.string()),
    ]
)

# What rows have beside the schema's columns on their way to a part. These two go to the part's sidecars.
EMBEDDING_COLUMN = "embedding"
IMAGE_BYTES_COLUMN = "image_bytes"
# These place a row in the run's input, for the part's footer.
FRAGMENT, FRAGMENT_ROW, ENDS_FRAGMENT = "smallcap.fragment", "smallcap.fragment_row", "smallcap.ends_fragment"
# `logprob` is what a tar's JSON files call `caption_logprob`.
_TAKEN_NAMES = (*CAPTION_COLUMNS.names, EMBEDDING_COLUMN, IMAGE_BYTES_COLUMN, "logprob")
_RESERVED_PREFIX = "smallcap."

_VERSION_KEY = b"smallcap.schema_version"
_KEPT_KEY = b"smallcap.kept_columns"


def caption_schema(run_id: str, model_id: str, index_id: str, kept_columns: pa.Schema | None = None) -> pa.Schema:
    """Returns a part's columns with the file metadata that every part carries.

    Args:
        run_id: Of the run.
        model_id: Of the run's model.
        index_id: Of the index version that the run retrieves from.
        kept_columns: Columns of the input that pass through to the output.

    Raises:
        ConfigError: Kept columns have names that smallcap's own columns have.
    """
    kept = [pa.field(field.name, field.type) for field in kept_columns or ()]  # without flags of the input's own
    kept_names = [field.name for field in kept]
    check_kept_columns(kept_names)
    metadata = {
        _VERSION_KEY: str(SCHEMA_VERSION).encode(),
        b"smallcap.run_id": run_id.encode(),
        b"smallcap.model_id": model_id.encode(),
        b"smallcap.index_id": index_id.encode(),
        _KEPT_KEY: json.dumps(kept_names).encode(),
    }
    return pa.schema([*CAPTION_COLUMNS, *kept], metadata)


def check_kept_columns(names: Sequence[str]) -> None:
    """Checks the names of columns that are to pass through from the input to the output.

    Raises:
        ConfigError: One is a name of the output's own columns, or is given twice.
    """
    taken = {
        name for name in names if name in _TAKEN_NAMES or name.startswith(_RESERVED_PREFIX) or names.count(name) > 1
    }
    if taken:
        raise ConfigError(
            "Columns to keep have names that the output needs, or one of them is named twice.",
            where="keep_columns",
            expected=f"each name once, and none of {', '.join(_TAKEN_NAMES)} or {_RESERVED_PREFIX}…",
            found=", ".join(sorted(taken)),
            remedy="Rename these columns in the input, or do not keep them.",
        )


def kept_columns(schema: pa.Schema) -> list[str]:
    """Returns the names of the columns that a part took from the input.

    Raises:
        SchemaError: The metadata that names them is missing or damaged.
    """
    found = (schema.metadata or {}).get(_KEPT_KEY, b"")
    try:
        names = json.loads(found)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SchemaError(
            "A part's list of kept columns is damaged.",
            expected="file metadata smallcap.kept_columns, a JSON list of names",
            found=repr(found),
        )
    return names


def check_caption_schema(schema: pa.Schema, where: str) -> None:
    """Checks that a Parquet part can be read as a caption part.

    Raises:
        SchemaError: It was not written by smallcap, or is of another schema version, or its columns differ.
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
    names = [*CAPTION_COLUMNS.names, *kept_columns(schema)]
    fixed = pa.schema(list(schema)[: len(CAPTION_COLUMNS)])
    if not fixed.equals(CAPTION_COLUMNS, check_metadata=False) or schema.names != names:
        raise SchemaError(
            "This part's columns are not those of its schema version.",
            where=where,
            expected=", ".join(names),
            found=", ".join(schema.names),
        )
