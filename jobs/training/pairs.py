"""Images with their captions, one pair at a time, from lists: COCO's and Karpathy's JSON, CSV, TSV, JSONL, Parquet.

Formats that are also caption dumps are read by the reader of dumps. It opens no image.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from index_builder.dumps.formats import Columns, read_rows
from smallcap import storage
from smallcap.errors import SchemaError
from smallcap.training.config import TrainConfig
from smallcap.training.feature_store import Split

_KARPATHY_SPLITS: dict[Any, Split] = {"train": "train", "restval": "train", "val": "validation"}
_BATCH_ROWS = 10_000


class Pair(NamedTuple):
    """One image and one of its captions."""

    split: Split
    image_id: str
    image_uri: str
    caption: str


def read_pairs(uri: str, config: TrainConfig, split: Split, on_malformed: Callable[[], None]) -> Iterator[Pair]:
    """Reads a list of images with captions: COCO's or Karpathy's JSON, CSV, TSV or JSONL.

    Args:
        uri: Of the file.
        config: The columns, and the folder of the images.
        split: Of all images, where the file has no splits of its own.
        on_malformed: Is called for each row that cannot be read.

    Raises:
        SchemaError: The file is damaged, or names no images.
    """
    data, root = config.data, config.images or uri.rsplit("/", 1)[0]
    with storage.local_file(uri) as path:
        if uri.lower().endswith(".json") and (images := _karpathy_images(path.read_bytes())):
            yield from _karpathy_pairs(images, root)
            return
        for row in read_rows(path, uri, Columns(data.caption_column, data.image_column)):
            if row.problem or not row.text.strip():
                on_malformed()
            elif row.image_id is None:
                raise SchemaError(
                    "A caption has no image.",
                    where=f"{uri}: line {row.line}",
                    expected=f"a column {data.image_column}",
                    remedy="Name the column: --set data.image_column=NAME.",
                )
            else:
                yield Pair(split, row.image_id, _below(root, row.image_id), clean(row.text))


def captions_of(table: pa.Table, json_field: str) -> list[list[str]]:
    """Returns each image's captions.

    Args:
        table: Nothing but the columns that its source had for them: `txt` and `json` of a tar, or one of strings or of
            lists of strings.
        json_field: The field of a tar's JSON files that holds the caption, or a list; `txt` stands in for it.
    """
    if "json" in table.column_names:
        found = [
            _json_field(text, json_field) or plain
            for text, plain in zip(table["json"].to_pylist(), table["txt"].to_pylist(), strict=True)
        ]
    else:
        found = table[0].to_pylist()
    lists = [[value] if isinstance(value, str) else value or [] for value in found]
    return [[clean(text) for text in texts if isinstance(text, str) and text.strip()] for texts in lists]


def clean(text: str) -> str:
    """Returns a caption on one line."""
    return " ".join(text.split())


def _karpathy_images(data: bytes) -> list[dict[str, Any]] | None:
    """Returns the images of Karpathy's JSON; None for any other, which the reader of dumps judges."""
    try:
        content = json.loads(data)
    except ValueError:
        return None
    images = content.get("images") if isinstance(content, dict) else None
    return images if isinstance(images, list) and images and "sentences" in images[0] else None


def _karpathy_pairs(images: Sequence[dict[str, Any]], root: str) -> Iterator[Pair]:
    """Yields the pairs of Karpathy's train, restval and val images.

    Captions are the sentences' tokens, in lower case and without punctuation, as the reference trains on them. The
    images lie below ROOT/filepath, or where they do not, below ROOT.
    """
    first = images[0]
    nested = "filepath" in first and storage.exists(storage.join(root, first["filepath"], first["filename"]))
    for image in images:
        split = _KARPATHY_SPLITS.get(image.get("split", "train"))
        if split is not None:
            folder = storage.join(root, image["filepath"]) if nested else root
            for sentence in image["sentences"]:
                caption = " ".join(sentence["tokens"]) if "tokens" in sentence else clean(sentence["raw"])
                yield Pair(split, image["filename"], _below(folder, image["filename"]), caption)


def parquet_pairs(uri: str, config: TrainConfig, split: Split) -> Iterator[Pair]:
    """Reads a Parquet list of URIs, whose captions are strings or lists of them; see `read_pairs`."""
    data, root = config.data, config.images or uri.rsplit("/", 1)[0]
    with storage.open_ranged(uri) as file:
        parquet = pq.ParquetFile(file)
        names = parquet.schema_arrow.names
        if data.image_column not in names:
            raise SchemaError(
                "The Parquet file has no column of images.",
                where=uri,
                expected=data.image_column,
                found=", ".join(names),
                remedy="Name the column: --set data.image_column=NAME.",
            )
        column = caption_column(parquet.schema_arrow, data.caption_column, uri)
        ids = data.id_column if data.id_column in names else data.image_column
        for batch in parquet.iter_batches(_BATCH_ROWS, columns=list({data.image_column, column, ids})):
            table = pa.Table.from_batches([batch])
            captions = captions_of(table.select([column]), column)
            images, image_ids = table[data.image_column].to_pylist(), table[ids].to_pylist()
            for image, image_id, texts in zip(images, image_ids, captions, strict=True):
                for text in texts:
                    yield Pair(split, str(image_id), _below(root, image), text)


def caption_column(schema: pa.Schema, wanted: str, uri: str) -> str:
    """Returns the column of a Parquet file that holds captions: the wanted one, or its plural.

    Raises:
        SchemaError: There is neither.
    """
    column = next((name for name in (wanted, f"{wanted}s") if name in schema.names), None)
    if column is None:
        raise SchemaError(
            "The Parquet file has no column of captions.",
            where=uri,
            expected=wanted,
            found=", ".join(schema.names),
            remedy="Name the column: --set data.caption_column=NAME.",
        )
    return column


def _json_field(text: str | None, name: str) -> Any:
    try:
        fields = json.loads(text or "null")
    except ValueError:
        return None
    return fields.get(name) if isinstance(fields, dict) else None


def _below(root: str, path: str) -> str:
    return path if "://" in path or path.startswith("/") else storage.join(storage.absolute(root), path)
