"""The columns and the metadata of the parts of a captioning run, and their check by readers.

Columns kept from the input follow the fixed ones; a part names them in its metadata.

docs/formats.md is the authority. A change here raises `SCHEMA_VERSION`, keeps reading version 1, and gets a CHANGELOG
heading.
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
        pa.field("sources", pa.list_(pa.string())),  # every dump file that has this caption
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
        pa.field("alternatives", pa.list_(ALTERNATIVE_TYPE)),  # the image's other captions, best first
        pa.field("neighbours", pa.list_(NEIGHBOUR_TYPE)),
        pa.field("copied_share", pa.float32()),  # these two by `smallcap.evaluation.shared_words`
        pa.field("neighbour_agreement", pa.float32()),
        pa.field("retrieval_score", pa.float32()),  # mean cosine of image and neighbours
        pa.field("alt_clip_score", pa.float32()),  # cosine of image and the text of the score column
        pa.field("best_caption", pa.string()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error_code", pa.string()),
        pa.field("error_message", pa.string()),
    ]
)

# What follows from a row's caption and neighbours. The task that writes a part computes it, not the model's process.
SHARED_WORDS_COLUMNS = ("copied_share", "neighbour_agreement")

# Columns of rows on their way to a part, besides those of the schema. These two go to the part's sidecars.
EMBEDDING_COLUMN = "embedding"
IMAGE_BYTES_COLUMN = "image_bytes"
# These three name a row's place in the run's input, for the part's footer.
FRAGMENT, FRAGMENT_ROW, ENDS_FRAGMENT = "smallcap.fragment", "smallcap.fragment_row", "smallcap.ends_fragment"
# These two are where the sidecar with embeddings keeps it.
PLACE_COLUMNS = {FRAGMENT: "fragment", FRAGMENT_ROW: "fragment_row"}
LEFT_OUT = "smallcap.left_out"  # list<int32>: the `LeftOut` of a fragment at its last row, null elsewhere
# `logprob` is what a tar's JSON files call `caption_logprob`.
_TAKEN_NAMES = (*CAPTION_COLUMNS.names, EMBEDDING_COLUMN, IMAGE_BYTES_COLUMN, "logprob")
_RESERVED_PREFIX = "smallcap."

_VERSION_KEY = b"smallcap.schema_version"
_KEPT_KEY = b"smallcap.kept_columns"


def caption_schema(run_id: str, model_id: str, index_id: str, kept_columns: pa.Schema | None = None) -> pa.Schema:
    """Returns the columns of a run's parts, with their file metadata.

    Args:
        run_id: The run's id.
        model_id: The id of the run's model.
        index_id: The id of the index version from which the run retrieves.
        kept_columns: Columns of the input that pass through to the output.

    Raises:
        ConfigError: The name of a kept column is taken, or occurs twice.
    """
    kept = [pa.field(field.name, field.type) for field in kept_columns or ()]  # without the input's flags
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
        ConfigError: A name is taken by the output, or occurs twice.
    """
    taken = {
        name for name in names if name in _TAKEN_NAMES or name.startswith(_RESERVED_PREFIX) or names.count(name) > 1
    }
    if taken:
        raise ConfigError(
            "The output needs the name of a column to keep, or the name is given twice.",
            where="keep_columns",
            expected=f"each name once, and none of {', '.join(_TAKEN_NAMES)} or {_RESERVED_PREFIX}…",
            found=", ".join(sorted(taken)),
            remedy="Rename these columns in the input, or do not keep them.",
        )


def kept_columns(schema: pa.Schema) -> list[str]:
    """Returns the names of the columns that a part keeps from the input.

    Raises:
        SchemaError: The metadata that names them is missing or damaged.
    """
    text = (schema.metadata or {}).get(_KEPT_KEY, b"")
    try:
        names = json.loads(text)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SchemaError(
            "A part's list of kept columns is damaged.",
            expected="file metadata smallcap.kept_columns, a JSON list of names",
            found=repr(text),
        )
    return names


def check_caption_schema(schema: pa.Schema, where: str) -> None:
    """Checks that a Parquet part can be read as a caption part.

    Raises:
        SchemaError: smallcap did not write it, it has another schema version, or its columns differ.
    """
    version = (schema.metadata or {}).get(_VERSION_KEY)
    if version is None:
        raise SchemaError(
            "This Parquet file is not a part of a captioning run.",
            where=where,
            expected="file metadata smallcap.schema_version",
            found="none",
            remedy="Give the run an empty output folder.",
        )
    if version != str(SCHEMA_VERSION).encode():
        raise SchemaError(
            "This part has an unknown schema version.",
            where=where,
            expected=str(SCHEMA_VERSION),
            found=version.decode(),
            remedy="Read it with the smallcap release that wrote it, or with a newer one.",
        )
    names = [*CAPTION_COLUMNS.names, *kept_columns(schema)]
    fixed = pa.schema(list(schema)[: len(CAPTION_COLUMNS)])
    if not fixed.equals(CAPTION_COLUMNS, check_metadata=False) or schema.names != names:
        raise SchemaError(
            "The columns of this part contradict its schema version.",
            where=where,
            expected=", ".join(names),
            found=", ".join(schema.names),
        )
