"""Copies a run's captions into WebDataset tars, one for each part of the run, with the images or without them.

The images come from the run's own tars, or else from where the run found them. A tar appears whole, and a file in
`_export/` then says what is in it: a repeated export goes on with the tars that are not there yet. This module does not
know how tars are written (`webdataset`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from smallcap import storage
from smallcap.config import InputConfig
from smallcap.errors import ConfigError, RowError
from smallcap.images.fetching import FetchOptions, fetch_objects
from smallcap.images.fragments import qualified_id
from smallcap.images.work_list import load_work_list, read_fragment
from smallcap.output.part_files import WEBDATASET_FOLDER, sidecar_uri, write_tar
from smallcap.output.reading import Captions
from smallcap.output.table_export import check_empty, other_run
from smallcap.output.webdataset import Sample, read_images, write_samples
from smallcap.records import VersionedRecord, load_record

_FOLDER = "_export"
_EXPORT_FILE = "export.json"
_NOT_IN_RECORDS = ("image_id", "caption", "status", "error_code", "error_message")
NEEDED_COLUMNS = ("image_id", "image_uri", "caption")


class ExportRecord(VersionedRecord):
    """Whose tars are in the folder."""

    format_version: Literal[1] = 1
    run_id: str


class TarRecord(VersionedRecord):
    """What is in a tar."""

    format_version: Literal[1] = 1
    rows_of: str  # the fingerprint of the captions, and whether images are wanted
    samples: int
    left_out: dict[str, int]  # captioned images that could not be read again, by error code


@dataclass(frozen=True)
class TarExport:
    """A run's captions on their way to tars.

    Attributes:
        captions: The rows; `NEEDED_COLUMNS` are among their columns.
        run_id: The run's id.
        columns: The columns that go to the JSON files, besides id and caption.
        input: How the run has read its images; None for tars without images.
    """

    captions: Captions
    run_id: str
    columns: tuple[str, ...]
    input: InputConfig | None = None

    def write(self, out: str) -> tuple[int, dict[str, int]]:
        """Writes the tars that are not there yet, and removes those of the run that are out of date.

        Args:
            out: A folder or prefix.

        Returns:
            The number of samples, and of captioned images that are left out as they cannot be read again, by code.

        Raises:
            ConfigError: Something else is in the folder.
            SchemaError: A part of the run, its list of images or a tar is damaged.
            StorageError: A service fails.
        """
        self._claim(out)
        samples, left_out = 0, Counter[str]()
        stems = [name.removesuffix(".parquet") for name in self.captions.parts()]
        self._remove_others(out, set(stems))
        rows_of = f"{self.captions.fingerprint()} {'with' if self.input else 'without'} images"
        for stem in stems:
            record = self._write_tar(out, stem, rows_of)
            samples += record.samples
            left_out.update(record.left_out)
        return samples, dict(left_out)

    def _claim(self, out: str) -> None:
        uri = storage.join(out, _FOLDER, _EXPORT_FILE)
        found = load_record(ExportRecord, uri, ConfigError)
        if found is None:
            check_empty(storage.absolute(out))
            ExportRecord(run_id=self.run_id).write(uri)
        elif found.run_id != self.run_id:
            raise other_run(out, self.run_id, found.run_id)

    def _remove_others(self, out: str, stems: set[str]) -> None:
        """Removes the tars of parts that the run has joined with others since, each after what says of it."""
        for folder, ending in ((_FOLDER, ".json"), ("", ".tar")):
            for uri in storage.list_folder(storage.join(out, folder) if folder else out):
                name = uri.rpartition("/")[2]
                if name.startswith("part-") and name.endswith(ending) and name.removesuffix(ending) not in stems:
                    storage.remove(uri)

    def _write_tar(self, out: str, stem: str, rows_of: str) -> TarRecord:
        """Writes one tar unless it is there with these rows and with all images."""
        uri = storage.join(out, _FOLDER, f"{stem}.json")
        record = load_record(TarRecord, uri, ConfigError)
        if record is not None and record.rows_of == rows_of and not record.left_out:
            return record
        storage.remove(uri)
        left_out = Counter[str]()
        written = 0

        def write(path: Path) -> int:
            nonlocal written
            written = write_samples(path, self._samples(f"{stem}.parquet", left_out))
            return written

        write_tar(storage.join(out, f"{stem}.tar"), write)
        record = TarRecord(rows_of=rows_of, samples=written, left_out=dict(left_out))
        record.write(uri)
        return record

    def _samples(self, part: str, left_out: Counter[str]) -> Iterator[Sample]:
        rows = {row["image_id"]: row for batch in self.captions.of_part(part) for row in batch.to_pylist()}
        if self.input is None:
            yield from (self._sample(row, None) for row in rows.values())
            return
        for image_id, uri, data in self._images(part, self.input):
            row = rows.get(image_id)
            if row is None or row["image_uri"] != uri:
                row = rows.get(qualified_id(image_id, uri))
            if row is None or row["image_uri"] != uri:
                continue  # it has no caption, or another part has it
            if isinstance(data, RowError):
                left_out[data.code.value] += 1
            else:
                yield self._sample(row, data)

    def _sample(self, row: dict[str, Any], data: bytes | None) -> Sample:
        record = {
            "logprob" if name == "caption_logprob" else name: row[name]
            for name in self.columns
            if name not in _NOT_IN_RECORDS
        }
        return Sample(row["image_id"], data, row["caption"], record)

    def _images(self, part: str, config: InputConfig) -> Iterator[tuple[str, str, bytes | RowError]]:
        """Yields the images of a part, captioned or not: id, URI, and content."""
        tar = sidecar_uri(self.captions.run, WEBDATASET_FOLDER, part)
        if storage.exists(tar):
            yield from read_images(tar)
            return
        work = load_work_list(self.captions.run)
        assert work is not None, "a part's rows are those of a list"
        options = FetchOptions.of(config)
        for number, wanted in self.captions.rows_of_part(part).items():
            for images in read_fragment(work.fragments[number], wanted, config, work.kept_columns):
                contents = fetch_objects(images.image_uris, options).data if images.data is None else images.data
                yield from zip(images.image_ids, images.image_uris, contents, strict=True)
