"""Lists what to train on: images and their captions from COCO, Karpathy, CSV, JSONL, Parquet and WebDataset sources.

Sources that name their images become a stored list with one row for each image and all its captions; tars and Parquet
files with image bytes are read where they are. Both are cut into the fragments that captioning reads. While the
captions of lists are grouped by image, they are in memory; images never are.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.training.pairs import caption_columns, read_pairs
from smallcap import storage
from smallcap.captions.rows import find_column
from smallcap.errors import ConfigError, SchemaError
from smallcap.images.fragments import FRAGMENT_ROWS, Fragment
from smallcap.images.kinds import TAR_SUFFIXES, without_tar_suffix
from smallcap.images.parquet import ParquetOutline, image_bytes_column, read_outlines
from smallcap.images.sources import IMAGE_COLUMNS
from smallcap.images.tars import choose_tar_ids
from smallcap.images.work_list import count_images
from smallcap.output.coverage import Coverage, WorkItem, work_left
from smallcap.tables import TABLE_SUFFIXES, format_of
from smallcap.training.config import TrainConfig
from smallcap.training.feature_store import SPLITS, Split

LISTS_FOLDER = "_lists"
_CAPTIONS = pa.field("captions", pa.list_(pa.string()))


@dataclass(frozen=True)
class TrainItem:
    """Images of a split that are read together.

    Attributes:
        split: The images' split.
        work: The rows of a fragment.
        kept: The columns that hold the captions.
    """

    split: Split
    work: WorkItem
    kept: pa.Schema


@dataclass
class TrainInputs:
    """Everything that a run trains on.

    Attributes:
        items: The work items, in order.
        sha256: Fingerprint of ids, captions, and the names and sizes of tars and Parquet files.
        malformed: How many rows in lists could not be read.
        listed_images, listed_examples: How many images and examples of the split train are in lists; what tars and
            Parquet files hold is not known yet.
    """

    items: list[TrainItem] = field(default_factory=list)
    sha256: str = ""
    malformed: int = 0
    listed_images: int = 0
    listed_examples: int = 0

    def has(self, split: Split) -> bool:
        """Returns whether there are images of a split."""
        return any(item.split == split for item in self.items)


def list_inputs(config: TrainConfig, folder: str) -> TrainInputs:
    """Lists the images and captions of a run, and stores those that lists name.

    Args:
        config: The run's config.
        folder: Where lists are stored, as `_lists/SPLIT.parquet`.

    Raises:
        ConfigError: There are no images with captions to train on.
        SchemaError: A source is damaged, or lacks a column.
        StorageError: A source does not exist, or the service fails.
    """
    listing = _Listing(config, folder)
    for source in config.sources:
        listing.add(source, "train")
    for source in config.validation:
        listing.add(source, "validation")
    inputs = listing.finish()
    if not inputs.has("train"):
        raise ConfigError(
            "There are no images with captions.",
            where=", ".join(config.sources),
            expected=f"files ending in {' '.join((*TABLE_SUFFIXES, *TAR_SUFFIXES))}",
        )
    return inputs


class _Listing:
    """Collects a run's sources and cuts them into fragments."""

    def __init__(self, config: TrainConfig, folder: str) -> None:
        self._config, self._folder = config, folder
        # By id and URI: files of two folders may call other images the same.
        self._images: dict[Split, dict[tuple[str, str], list[str]]] = {split: {} for split in SPLITS}
        self._tars: dict[Split, dict[str, str]] = {split: {} for split in SPLITS}
        self._parquet: dict[Split, dict[str, tuple[str, ParquetOutline]]] = {split: {} for split in SPLITS}
        self._numbers = count()
        self._inputs = TrainInputs()

    def add(self, source: str, wanted: Split) -> None:
        """Adds a file, or the files of a folder: its tars, or, where it has none, its lists and Parquet files."""
        source = storage.absolute(source)
        files = storage.list_files(source, (*TABLE_SUFFIXES, *TAR_SUFFIXES))
        if not files and format_of(source) == ".txt":  # read where it is named: a folder's notes are not captions
            files = [source]
        tars = [file for file in files if file.lower().endswith(TAR_SUFFIXES)]
        if tars:  # downloaders leave statistics as JSON and Parquet next to them
            self._tars[wanted] |= {tar: without_tar_suffix(storage.path_below(source, tar)) for tar in tars}
            return
        parquet = [file for file in files if storage.suffix_of(file) == ".parquet"]
        for outline in read_outlines(parquet):
            if outline.problem:
                raise SchemaError("The Parquet file cannot be read.", where=outline.uri, found=outline.problem)
            if image_bytes_column(outline.schema, self._config.data, outline.uri) is None:
                self._add_pairs(outline.uri, wanted)
            else:
                name = storage.path_below(source, outline.uri).removesuffix(".parquet")
                self._parquet[wanted][outline.uri] = (name, outline)
        for file in sorted({*files} - {*parquet}):
            self._add_pairs(file, wanted)

    def _add_pairs(self, uri: str, wanted: Split) -> None:
        """Adds the pairs of a file; its validation split counts only where no other validation is given."""
        for pair in read_pairs(uri, self._config, wanted):
            if pair is None:
                self._inputs.malformed += 1
            elif pair.split == wanted or (wanted == "train" and not self._config.validation):
                self._images[pair.split].setdefault((pair.image_id, pair.image_uri), []).append(pair.caption)

    def finish(self) -> TrainInputs:
        """Stores the lists and returns all items."""
        digest = hashlib.sha256()
        for split in SPLITS:
            fragments = [
                *self._list_fragments(split, digest),
                *self._tar_fragments(split, digest),
                *self._parquet_fragments(split, digest),
            ]
            kept_of = {fragment.number: kept for fragment, kept in fragments}
            items = work_left(
                [fragment for fragment, _ in fragments],
                Coverage(()),
                self._config.limit,
                lambda fragment, most: count_images(fragment, most, self._config.data),
            )
            self._inputs.items += [TrainItem(split, work, kept_of[work.fragment.number]) for work in items]
        listed = list(self._images["train"].values())[: self._config.limit]
        self._inputs.listed_images = len(listed)
        self._inputs.listed_examples = sum(map(len, listed))
        self._inputs.sha256 = digest.hexdigest()
        return self._inputs

    def _list_fragments(self, split: Split, digest: Any) -> Iterator[tuple[Fragment, pa.Schema]]:
        images = self._images[split]
        if not images:
            return
        for (image_id, _), captions in images.items():
            digest.update(json.dumps([split, image_id, captions]).encode())
        uri = storage.join(self._folder, LISTS_FOLDER, f"{split}.parquet")
        ids, uris = zip(*images, strict=True)
        table = pa.table([ids, uris, list(images.values())], pa.schema([*IMAGE_COLUMNS, _CAPTIONS]))
        buffer = io.BytesIO()
        pq.write_table(table, buffer, row_group_size=FRAGMENT_ROWS, compression="zstd")
        storage.write_bytes(uri, buffer.getvalue())
        for group, start in enumerate(range(0, len(images), FRAGMENT_ROWS)):
            rows = min(FRAGMENT_ROWS, len(images) - start)
            yield Fragment(next(self._numbers), "uris", storage.absolute(uri), group, rows), pa.schema([_CAPTIONS])

    def _tar_fragments(self, split: Split, digest: Any) -> Iterator[tuple[Fragment, pa.Schema]]:
        tars = self._tars[split]
        by_tar = bool(tars) and choose_tar_ids(list(tars)) == "tar/key"
        kept = pa.schema([pa.field("txt", pa.string()), pa.field("json", pa.string())])
        for uri, name in tars.items():
            digest.update(json.dumps([split, name, storage.size(uri)]).encode())
            yield Fragment(next(self._numbers), "tar", uri, 0, None, f"{name}/" if by_tar else ""), kept

    def _parquet_fragments(self, split: Split, digest: Any) -> Iterator[tuple[Fragment, pa.Schema]]:
        for uri, (name, outline) in self._parquet[split].items():
            digest.update(json.dumps([split, name, storage.size(uri)]).encode())
            column = find_column(outline.schema.names, caption_columns(self._config), uri)
            kept = pa.schema([pa.field(column, outline.schema.field(column).type)])
            for group, rows in enumerate(outline.rows):
                if rows:
                    yield Fragment(next(self._numbers), "parquet", uri, group, rows, f"{name}/"), kept
