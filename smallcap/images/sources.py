"""Lists the sources of images as a stream: images by URI, tars, and Parquet files with images.

It opens lists and Parquet footers, never an image. The id of an image is its path below the source's folder, or the
list's id column, or its URI where the list has no such column.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from smallcap import storage
from smallcap.config import InputConfig
from smallcap.errors import ConfigError, SchemaError, StorageError
from smallcap.images.kinds import (
    ARCHIVE_SUFFIXES,
    IMAGE_SUFFIXES,
    SIDECAR_SUFFIXES,
    SIGNATURE_BYTES,
    TAR_SUFFIXES,
    begins_like_image,
    ends_like_image,
    without_tar_suffix,
)
from smallcap.images.lists import BATCH_ROWS, LIST_SUFFIXES, ImageList, check_kept_columns
from smallcap.images.parquet import (
    ParquetOutline,
    check_id_column,
    image_bytes_column,
    read_outlines,
    with_images,
)
from smallcap.images.place_check import unreadable_file
from smallcap.local_files import local_path
from smallcap.object_state import state_of
from smallcap.tables import format_of

# Why a file was passed over.
HIDDEN, OTHER_ENDING, NO_ENDING, ARCHIVE, PARQUET = "hidden", "other_ending", "no_ending", "archive", "parquet"
NOT_LOOKED_INTO = "not_looked_into"
_OBJECTS_LOOKED_INTO = 256  # not on a local disk: each takes a request or two
_OWN_NAMES = ("part-", "_")  # what a run writes into OUT begins so
IMAGE_COLUMNS = pa.schema([pa.field("image_id", pa.string()), pa.field("image_uri", pa.string())])
STATE_COLUMN = "smallcap.state"  # string: the object's state when it was listed; null where a list names it
_LISTED_COLUMNS = IMAGE_COLUMNS.append(pa.field(STATE_COLUMN, pa.string()))


@dataclass(frozen=True)
class TarFile:
    """One tar; `name` is its path below its source, without the suffix."""

    uri: str
    name: str


@dataclass(frozen=True)
class ParquetImages:
    """One Parquet file with image bytes; `name` is its path below its source, without the suffix."""

    name: str
    outline: ParquetOutline


@dataclass
class ImageSources:
    """All sources of a run; what is not given is filled while `tables` is read to its end.

    Attributes:
        sources: Folders, prefixes, globs, images, tars, Parquet files, and lists of URIs.
        config: The input's config, which names the columns of lists and Parquet files.
        keep_columns: Columns that pass through to the output.
        out: The run's output folder, whose files are not input, except to a source that lies in it.
        passed_over: How many files were left out though they look like images, by the reason.
        kept: The types of these columns, from the first source.
        tars: The tars, by URI.
        parquet: The Parquet files with image bytes, by URI.
    """

    sources: Sequence[str]
    config: InputConfig
    keep_columns: tuple[str, ...] = ()
    out: str = ""
    passed_over: Counter[str] = field(default_factory=Counter)
    kept: pa.Schema | None = None
    tars: dict[str, TarFile] = field(default_factory=dict)
    parquet: dict[str, ParquetImages] = field(default_factory=dict)
    _known: set[str] = field(default_factory=set, init=False)  # files that are not to be counted (again)
    _looked_into: int = field(default=0, init=False)

    def tables(self) -> Iterator[pa.Table]:
        """Yields id, URI, state and the kept columns of all images that have URIs of their own.

        Raises:
            ConfigError: The types of the kept columns differ between sources.
            SchemaError: A list or Parquet file is damaged, or lacks a column.
            StorageError: A source does not exist, or the service fails.
        """
        self.tars, self.parquet, self.passed_over = {}, {}, Counter()
        self._known, self._looked_into = set(map(storage.absolute, self.sources)), 0
        for source in self.sources:
            for table in self._list(storage.absolute(source)):
                self._check_kept_types(table.select(self.keep_columns).schema, source)
                yield _with_states(table).select([*_LISTED_COLUMNS.names, *self.keep_columns])

    def _list(self, source: str) -> Iterator[pa.Table]:
        suffix = format_of(source)
        if suffix not in LIST_SUFFIXES or (storage.is_folder(source) and not storage.is_glob(source)):
            yield from self._list_files(source)
            return
        lists = sorted(self._files(source, (suffix, f"{suffix}.gz"))) if storage.is_glob(source) else [source]
        if suffix == ".parquet":
            yield from self._list_parquet(source, lists)
        else:
            for uri in lists:
                yield from self._read_list(uri)

    def _list_files(self, source: str) -> Iterator[pa.Table]:
        """Lists the images and tars of a folder, prefix, glob or file, or its Parquet files where it has neither."""
        wanted: tuple[str, ...] = (*IMAGE_SUFFIXES, *TAR_SUFFIXES, ".parquet")
        parquet: list[str] = []
        has_images_or_tars = False
        uris: list[str] = []
        for uri in self._files(source, wanted):
            if uri.lower().endswith(".parquet"):
                parquet.append(uri)
                continue
            has_images_or_tars = True
            if uri.lower().endswith(IMAGE_SUFFIXES):
                uris.append(uri)
            else:
                self._add_tar(source, uri)
            if len(uris) == BATCH_ROWS:
                yield self._files_table(source, uris)
                uris = []
        if uris:
            yield self._files_table(source, uris)
        if has_images_or_tars:
            self._count_parquet(parquet)
        else:
            yield from self._list_parquet(source, sorted(parquet))

    def _count_parquet(self, uris: list[str]) -> None:
        """Counts the Parquet files with images among those that lie beside images or tars; others are metadata."""
        tars = {without_tar_suffix(uri) for uri in self.tars}  # img2dataset writes NAME.parquet beside NAME.tar
        for uri in with_images([uri for uri in uris if uri.removesuffix(".parquet") not in tars], self.config):
            self._pass_over(uri, PARQUET)

    def _files(self, source: str, suffixes: tuple[str, ...]) -> Iterator[str]:
        is_own: Callable[[str], bool] = _OwnFiles(self.out, source) if self.out else lambda uri: False

        def count_left_out(uri: str, hidden: bool) -> None:
            if not is_own(uri) and (reason := self._why_left_out(uri, hidden)):
                self._pass_over(uri, reason)

        for uri in storage.iter_files(source, suffixes, count_left_out):
            if not is_own(uri):
                yield uri

    def _pass_over(self, uri: str, reason: str) -> None:
        """Counts a file once, and not at all where it is a source of its own."""
        if uri in self._known:
            return
        if len(self.sources) > 1:  # which may overlap
            self._known.add(uri)
        self.passed_over[reason] += 1

    def _why_left_out(self, uri: str, hidden: bool) -> str | None:
        """Returns why a file is not taken that looks like an image, or may hold images; None for other files."""
        name = uri.rpartition("/")[2].lower()
        if name.startswith("._"):  # macOS adds ._NAME to each file
            return None
        endings = {
            HIDDEN: name.endswith((*IMAGE_SUFFIXES, *TAR_SUFFIXES)),
            OTHER_ENDING: ends_like_image(name),
            ARCHIVE: name.endswith(ARCHIVE_SUFFIXES),
        }
        reason = next((reason for reason, fits in endings.items() if fits), None)
        if reason or hidden or name.endswith(SIDECAR_SUFFIXES):
            return reason
        if not storage.is_local(uri):
            self._looked_into += 1
            if self._looked_into > _OBJECTS_LOOKED_INTO:
                return NOT_LOOKED_INTO
        return NO_ENDING if _begins_like_image(uri) else None

    def _files_table(self, source: str, uris: list[str]) -> pa.Table:
        check_kept_columns(self.keep_columns, (), f"{source} (files have no columns)")
        ids = [storage.path_below(source, uri) for uri in uris]
        states = [state_of(uri, local_path(uri) if storage.is_local(uri) else None) for uri in uris]
        return pa.table([ids, [str(uri) for uri in uris], states], schema=_LISTED_COLUMNS)

    def _add_tar(self, source: str, uri: str) -> None:
        name = without_tar_suffix(storage.path_below(source, uri))
        self._check_kept_types(pa.schema([pa.field(column, pa.string()) for column in self.keep_columns]), uri)
        self.tars.setdefault(uri, TarFile(uri, name))

    def _list_parquet(self, source: str, uris: list[str]) -> Iterator[pa.Table]:
        """Treats Parquet files as images where they hold image bytes, else as lists of URIs."""
        for outline in read_outlines(uris):
            name = storage.path_below(source, outline.uri).removesuffix(".parquet")
            if outline.problem and len(uris) == 1:
                raise SchemaError("The list of images cannot be read.", where=outline.uri, found=outline.problem)
            if outline.problem:
                self.parquet.setdefault(outline.uri, ParquetImages(name, outline))  # reading it gives its error row
            elif image_bytes_column(outline.schema, self.config, outline.uri) is None:
                yield from self._read_list(outline.uri)
            else:
                check_id_column(outline.schema, self.config, outline.uri)
                check_kept_columns(self.keep_columns, outline.schema.names, outline.uri)
                kept = pa.schema([_plain_field(outline.schema.field(column)) for column in self.keep_columns])
                self._check_kept_types(kept, outline.uri)
                self.parquet.setdefault(outline.uri, ParquetImages(name, outline))

    def _read_list(self, uri: str) -> Iterator[pa.Table]:
        return ImageList(uri, self.config, self.keep_columns).tables()

    def _check_kept_types(self, kept: pa.Schema, where: str) -> None:
        """Checks that the kept columns have the same types in all sources."""
        kept = pa.schema([pa.field(column.name, column.type) for column in kept])
        if self.kept is None:
            self.kept = kept
        elif not kept.equals(self.kept):
            raise ConfigError(
                "The columns to keep have different types in different sources.",
                where=where,
                expected=_describe(self.kept),
                found=_describe(kept),
                remedy="Give each column one type (CSV and tars have strings), or caption in separate runs.",
            )


class _OwnFiles:
    """Says of files whether they are a run's own: those in its folder, by whatever links they are reached.

    Args:
        out: The run's folder.
        source: The source that is listed. Where it lies in that folder, only what the run writes there is its own.
    """

    def __init__(self, out: str, source: str) -> None:
        self._out = self._resolved(storage.absolute(out))
        inside = self._resolved(source).startswith(self._out)
        self._own = tuple(self._out + name for name in _OWN_NAMES) if inside else (self._out,)
        self._folder = self._resolved_folder = ""  # the last one, as files of one folder come one after the other

    @staticmethod
    def _resolved(folder: str) -> str:
        return storage.join(os.path.realpath(folder) if storage.is_local(folder) else folder, "")

    def __call__(self, uri: str) -> bool:
        folder, _, name = uri.rpartition("/")
        if folder != self._folder:
            self._folder, self._resolved_folder = folder, self._resolved(folder)
        return f"{self._resolved_folder}{name}".startswith(self._own)


def _with_states(table: pa.Table) -> pa.Table:
    """Returns rows with a column of states: a list knows none."""
    if STATE_COLUMN in table.column_names:
        return table
    return table.append_column(_LISTED_COLUMNS.field(STATE_COLUMN), pa.nulls(len(table), pa.string()))


def _begins_like_image(uri: str) -> bool:
    if storage.is_local(uri) and not local_path(storage.absolute(uri)).is_file():  # a pipe would not end
        return False
    try:
        with storage.open_ranged(uri) as file:
            return begins_like_image(file.read(SIGNATURE_BYTES))
    except (StorageError, OSError) as error:  # a link to nothing, a folder, a file of another user
        if isinstance(error, StorageError) and not storage.is_local(uri):
            unreadable_file(error, uri)
        return False


def _plain_field(column: pa.Field) -> pa.Field:
    if pa.types.is_dictionary(column.type):
        return column.with_type(column.type.value_type)
    return column.with_type(pa.string()) if pa.types.is_null(column.type) else column


def _describe(kept: pa.Schema) -> str:
    return ", ".join(f"{column.name}: {column.type}" for column in kept)
