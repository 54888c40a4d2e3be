"""Reads images with their captions: one pair at a time from caption files, or from the columns of shards.

It opens no image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa

from smallcap import storage
from smallcap.captions.reader import open_captions
from smallcap.captions.rows import CaptionColumns, CaptionRow
from smallcap.errors import SchemaError
from smallcap.field_values import is_text, json_fields
from smallcap.images.list_places import with_refusals
from smallcap.training.config import TrainConfig
from smallcap.training.feature_store import Split

_KARPATHY_SPLITS: dict[str, Split] = {"train": "train", "restval": "train", "val": "validation"}


class Pair(NamedTuple):
    """One image and one of its captions."""

    split: Split
    image_id: str
    image_uri: str
    caption: str


def caption_columns(config: TrainConfig, has_ids: bool = False) -> CaptionColumns:
    """Returns the columns of tables that hold images and captions to train on.

    Args:
        config: The run's config.
        has_ids: Whether image ids may have a column, besides that of image paths.
    """
    data = config.data
    return CaptionColumns(
        data.caption_column,
        image_id=data.id_column if has_ids else data.image_column,
        image_path=data.image_column if has_ids else None,
        tokens=True,  # as the reference trains on them
        remedy="Name the columns: --set data.caption_column=NAME, --set data.image_column=NAME.",
    )


def read_pairs(uri: str, config: TrainConfig, split: Split) -> Iterator[Pair | None]:
    """Reads a file of images with captions; yields None for each row that cannot be read.

    Args:
        uri: COCO captions, Karpathy's splits, or a table.
        config: The run's config: its columns, and the folder of images.
        split: The split of all images, where the file names no splits.

    Raises:
        SchemaError: The file is damaged, or names no images.
        StorageError: The file cannot be read.
    """
    root = storage.absolute(config.images or uri.rpartition("/")[0])
    has_ids = storage.suffix_of(uri) == ".parquet"
    columns = caption_columns(config, has_ids)
    has_folders: bool | None = None  # whether Karpathy's images lie in the folders that the file names
    nameless: CaptionRow | None = None  # the first caption without an image
    any_image = False
    with open_captions(uri, columns) as rows:
        for row in rows:
            image_split = split if row.split is None else _KARPATHY_SPLITS.get(row.split)
            if image_split is None:
                continue
            caption = clean(row.text)
            if row.problem or not caption:
                yield None
                continue
            image = row.image_path if has_ids else row.image_id
            if not image:
                nameless = nameless or row
                yield None
                continue
            if not has_ids and row.image_path:
                if has_folders is None:
                    has_folders = storage.exists(_below(root, row.image_path))
                image = row.image_path if has_folders else image
            any_image = True
            place = _below(root, image)
            if not config.data.trust_lists:
                (place,) = with_refusals([place], uri, root)
            yield Pair(image_split, row.image_id or image, place, caption)
    if nameless is not None and not any_image:
        raise SchemaError(
            "No caption names its image.",
            where=f"{uri}: {nameless.place}",
            expected=f"a column {config.data.image_column}",
            remedy=columns.remedy,
        )


def captions_of(table: pa.Table, json_field: str) -> list[list[str]]:
    """Returns each image's captions, without those that are not text.

    Args:
        table: The columns with captions, and no others: `txt` and `json` from a tar, or else one column of strings or
            lists of strings.
        json_field: The field of a tar's JSON files that holds a caption or a list of captions; where it is missing,
            `txt` is taken.
    """
    if "json" in table.column_names:
        values = [
            json_fields(text).get(json_field) or plain
            for text, plain in zip(table["json"].to_pylist(), table["txt"].to_pylist(), strict=True)
        ]
    else:
        values = table[0].to_pylist()
    lists = [[value] if isinstance(value, str) else value or [] for value in values]
    return [
        [clean(text) for text in texts if isinstance(text, str) and text.strip() and is_text(text)] for texts in lists
    ]


def clean(text: str) -> str:
    """Returns a caption on one line."""
    return " ".join(text.split())


def _below(root: str, path: str) -> str:
    return path if "://" in path or path.startswith("/") else storage.join(root, path)
