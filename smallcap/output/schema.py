"""The columns of a captioning run's Parquet parts: their versions, metadata, and the reader's check.

All parts of a run have the version that the run began with; readers know all versions. From version 3 on columns of the
input may follow the fixed ones; a part names them in its metadata, and its footer says what it holds (`part_files`).

The authority is docs/formats.md. A change here raises `SCHEMA_VERSION`, keeps reading the old one, and gets a CHANGELOG
heading.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import pyarrow as pa

from smallcap.errors import ConfigError, SchemaError

SCHEMA_VERSION = 3
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
# Version 3 has the same fixed columns; kept columns may follow them.
_COLUMNS = {1: _VERSION_1, 2: CAPTION_COLUMNS, 3: CAPTION_COLUMNS}
_KEEPS_COLUMNS = 3  # the first version that does

# What rows have beside the schema's columns on their way to a part. These two go to the part's sidecars.
EMBEDDING_COLUMN = "embedding"
IMAGE_BYTES_COLUMN = "image_bytes"
# These place a row in the run's input, for the part's footer.
FRAGMENT, FRAGMENT_ROW, ENDS_FRAGMENT = "smallcap.fragment", "smallcap.fragment_row", "smallcap.ends_fragment"
# `logprob` is what a tar's JSON files call `caption_logprob`.
_TAKEN_NAMES = (*CAPTION_COLUMNS.names, EMBEDDING_COLUMN, IMAGE_BYTES_COLUMN, "logprob")
_OWN_PREFIX = "smallcap."

_VERSION_KEY = b"smallcap.schema_version"
_KEPT_KEY = b"smallcap.kept_columns"


def caption_schema(
    run_id: str,
    model_id: str,
    index_id: str,
    version: int = SCHEMA_VERSION,
    kept_columns: pa.Schema | None = None,
) -> pa.Schema:
    """Returns a schema version's columns with the file metadata that every part carries.

    Args:
        run_id: Of the run.
        model_id: Of the run's model.
        index_id: Of the index version that the run retrieves from.
        version: Of the schema.
        kept_columns: Columns of the input that pass through to the output, from version 3 on.

    Raises:
        ConfigError: Kept columns have names that smallcap's own columns have.
        SchemaError: The version knows no kept columns.
    """
    metadata = {
        _VERSION_KEY: str(version).encode(),
        b"smallcap.run_id": run_id.encode(),
        b"smallcap.model_id": model_id.encode(),
        b"smallcap.index_id": index_id.encode(),
    }
    kept = [pa.field(field.name, field.type) for field in kept_columns or ()]  # without flags of the input's own
    if version >= _KEEPS_COLUMNS:
        metadata[_KEPT_KEY] = json.dumps([field.name for field in kept]).encode()
    elif kept:
        raise SchemaError(
            "A run that began with an older smallcap has no kept columns.",
            expected=f"schema version {_KEEPS_COLUMNS} or newer",
            found=str(version),
            remedy="Leave the kept columns out, or give another --out.",
        )
    check_kept_columns([field.name for field in kept])
    return pa.schema([*_COLUMNS[version], *kept], metadata)


def check_kept_columns(names: Sequence[str]) -> None:
    """Checks the names of columns that are to pass through from the input to the output.

    Raises:
        ConfigError: One is a name of the output's own columns, or is given twice.
    """
    taken = {name for name in names if name in _TAKEN_NAMES or name.startswith(_OWN_PREFIX) or names.count(name) > 1}
    if taken:
        raise ConfigError(
            "Columns to keep have names that the output needs, or one of them is named twice.",
            where="keep_columns",
            expected=f"each name once, and none of {', '.join(_TAKEN_NAMES)} or {_OWN_PREFIX}…",
            found=", ".join(sorted(taken)),
            remedy="Rename these columns in the input, or do not keep them.",
        )


def kept_columns(schema: pa.Schema) -> list[str]:
    """Returns the names of the columns that a part took from the input; none before version 3.

    Raises:
        SchemaError: The metadata that names them is damaged.
    """
    try:
        names = json.loads((schema.metadata or {}).get(_KEPT_KEY, b"[]"))
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SchemaError(
            "A part's list of kept columns is damaged.",
            expected="file metadata smallcap.kept_columns, a JSON list of names",
            found=repr(schema.metadata[_KEPT_KEY]),
        )
    return names


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
    kept = kept_columns(schema) if int(version) >= _KEEPS_COLUMNS else []
    fixed = pa.schema(list(schema)[: len(columns)])
    if not fixed.equals(columns, check_metadata=False) or schema.names[len(columns) :] != kept:
        raise SchemaError(
            "This part's columns are not those of its schema version.",
            where=where,
            expected=", ".join([*columns.names, *kept]),
            found=", ".join(schema.names),
        )


def to_newest_version(table: pa.Table) -> pa.Table:
    """Returns rows of any version with the newest version's columns, then those that were kept from the input.

    What an older version lacks is null.
    """
    missing = [field for field in CAPTION_COLUMNS if field.name not in table.column_names]
    for field in missing:
        table = table.append_column(field, pa.nulls(len(table), field.type))
    kept = [name for name in table.column_names if name not in CAPTION_COLUMNS.names]
    return table.select([*CAPTION_COLUMNS.names, *kept])
