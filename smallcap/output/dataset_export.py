"""Copies a run's captions into a data set as Hugging Face's libraries read it: Parquet files and a README.md.

The README.md names the folder of the Parquet files, and that folder the run and its rows. So an export counts from the
moment when the README.md is replaced, which comes last; on the Hub all of it is one commit. What an interrupted export
has left is in a folder that no README.md names, and the next one removes it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from smallcap import storage
from smallcap.errors import ConfigError, StorageError
from smallcap.hub import hub_endpoint, is_on_hub, parse_hub_uri
from smallcap.output.reading import Captions
from smallcap.output.table_export import check_empty, other_run
from smallcap.translated import patiently

_README = "README.md"
_FILE_ROWS = 500_000
_NAMED = re.compile(r'^  data_files: "(captions-(\w+)-\w+)/\*\.parquet"$', re.MULTILINE)


def export_dataset(captions: Captions, run_id: str, card: list[str], out: str) -> bool:
    """Makes a data set hold the captions, and nothing else; returns whether it did so already.

    Args:
        captions: The rows, with the columns to write.
        run_id: The run's id.
        card: The lines of the README.md below its front matter.
        out: A folder or prefix, or hf://datasets/USER/NAME of a data set that exists.

    Raises:
        ConfigError: What is there is something else than an export of this run, or `out` is no such place.
        SchemaError: A part of the run is damaged.
        StorageError: The service fails, or another writer has changed the data set meanwhile.
    """
    target = _HubTarget.open(out) if is_on_hub(out) else _FolderTarget(out)
    folder = f"captions-{run_id}-{captions.fingerprint()}"
    readme = target.readme()
    if readme is not None:
        named = _NAMED.search(readme)
        if named is None or named[2] != run_id:
            raise other_run(out, run_id, named[2] if named else None)
        if named[1] == folder:
            target.clean(folder)
            return True
    with storage.scratch_folder() as scratch:
        for number, path in enumerate(_write_files(captions, scratch)):
            target.add(path, f"{folder}/{number:05d}.parquet")
        path = scratch / _README
        path.write_text("\n".join([*front_matter(f"{folder}/*.parquet"), *card, ""]), encoding="utf-8")
        target.finish(path, folder, f"Captions of the smallcap run {run_id}")
    return False


def front_matter(files: str) -> list[str]:
    """Returns the first lines of a README.md, which name the Parquet files of a data set by a pattern."""
    about = ["task_categories: [image-to-text]", "tags: [image-captioning, smallcap]"]
    config = ["configs:", "- config_name: default", f'  data_files: "{files}"']
    return ["---", *about, *config, "---", ""]


def _write_files(captions: Captions, scratch: Path) -> Iterator[Path]:
    """Writes the rows to Parquet files one after the other; there is one at least, for the columns."""
    batches = iter(captions)
    batch = next(batches, pa.RecordBatch.from_pylist([], schema=captions.schema))
    number = 0
    while batch is not None:
        path = scratch / f"{number:05d}.parquet"
        rows = 0
        with pq.ParquetWriter(path, captions.schema, compression="zstd") as parquet:
            while batch is not None and rows < _FILE_ROWS:
                parquet.write_batch(batch)
                rows += len(batch)
                batch = next(batches, None)
        yield path
        number += 1


@dataclass(frozen=True)
class _FolderTarget:
    """A data set in a folder or below a prefix."""

    out: str

    def readme(self) -> str | None:
        """Returns the README.md of an earlier export.

        Raises:
            ConfigError: There is none, and something else is in the folder.
        """
        uri = storage.join(self.out, _README)
        if storage.exists(uri):
            return storage.read_bytes(uri).decode(errors="replace")
        others = [entry for entry in storage.list_folder(self.out) if not _is_ours(entry)]
        if others:
            check_empty(self.out)
        return None

    def add(self, path: Path, name: str) -> None:
        """Writes a file that does not count yet."""
        storage.move_in(path, storage.join(self.out, name))

    def finish(self, readme: Path, folder: str, message: str) -> None:
        """Makes the new files count, and no others."""
        storage.move_in(readme, storage.join(self.out, _README))
        self.clean(folder)

    def clean(self, folder: str) -> None:
        """Removes the files that do not count."""
        for entry in storage.list_folder(self.out):
            if _is_ours(entry) and entry.rpartition("/")[2] != folder:
                storage.remove(entry)


def _is_ours(uri: str) -> bool:
    return uri.rpartition("/")[2].startswith("captions-")


class _HubTarget:
    """A data set on the Hub.

    Args:
        out: The repository, for messages.
        repository: Its id.
        revision: The branch; by default `main`.
    """

    def __init__(self, out: str, repository: str, revision: str | None) -> None:
        from huggingface_hub import HfApi

        self._out, self._revision = out, revision
        self._repository = repository
        self._api = HfApi(endpoint=hub_endpoint())
        self._added: list[Any] = []

        def look() -> tuple[str | None, list[str]]:
            # What is decided here holds for this commit: the Hub refuses to follow upon another one.
            parent = self._api.repo_info(repository, repo_type="dataset", revision=revision).sha
            return parent, list(self._api.list_repo_files(repository, repo_type="dataset", revision=parent))

        self._parent, self._files = patiently(out, "open this data set", look)

    @classmethod
    def open(cls, out: str) -> _HubTarget:
        """Opens a data set that exists; errors are those of `export_dataset`."""
        place = parse_hub_uri(out)
        if place.type != "dataset" or place.path_in_repo:
            raise ConfigError(
                "This is no data set of the Hugging Face Hub.",
                where="--out",
                expected="hf://datasets/USER/NAME or hf://datasets/USER/NAME@BRANCH",
                found=out,
            )
        return cls(out, place.id, place.revision)

    def readme(self) -> str | None:
        """Returns the README.md of the commit that the export is to follow."""
        if _README not in self._files:
            return None
        place = f"hf://datasets/{self._repository}@{self._parent}"
        return storage.read_bytes(storage.join(place, _README)).decode(errors="replace")

    def add(self, path: Path, name: str) -> None:
        """Notes a file, which has to stay until `finish`."""
        from huggingface_hub import CommitOperationAdd

        self._added.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path))

    def finish(self, readme: Path, folder: str, message: str) -> None:
        """Makes one commit of the new files, and of the removal of others."""
        from huggingface_hub import CommitOperationDelete
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined] # documented all the same

        if not sys.stderr.isatty():
            disable_progress_bars()
        self.add(readme, _README)
        old = {name.partition("/")[0] for name in self._files if _is_ours(name.partition("/")[0])} - {folder}
        gone = [CommitOperationDelete(path_in_repo=f"{name}/", is_folder=True) for name in sorted(old)]

        def commit() -> None:
            try:
                self._api.create_commit(
                    self._repository,
                    [*self._added, *gone],
                    repo_type="dataset",
                    commit_message=message,
                    revision=self._revision,
                    parent_commit=self._parent,
                )
            except HfHubHTTPError as error:
                if error.response.status_code != 412:  # precondition failed
                    raise
                raise StorageError(
                    "Somebody has changed the data set during the export; nothing was written.",
                    where=self._out,
                    remedy="Run the same command again.",
                ) from error

        patiently(self._out, "write this data set", commit)

    def clean(self, folder: str) -> None:
        """Does nothing: the commit has removed what does not count."""
