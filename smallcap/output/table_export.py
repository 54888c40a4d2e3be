"""Copies a run's captions into a table of Apache Iceberg, Delta Lake or Lance, each by its own library.

A table has the captions of one run. It is made empty, with the run's name. An export is then one commit that names the
rows, and replaces all rows before: a repeated export finds it, and one that was killed has left files that no reader
sees. It streams.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from smallcap import storage
from smallcap.errors import ConfigError, SmallCapError
from smallcap.output.reading import Captions
from smallcap.s3 import s3_settings
from smallcap.translated import patiently

TableFormat = Literal["iceberg", "delta", "lance"]

RUN, EXPORT = "smallcap.run_id", "smallcap.export"  # properties of a table, of a commit, or of a schema
_PACKAGES = {"iceberg": "pyiceberg", "delta": "deltalake", "lance": "pylance"}
_FILE_ROWS = 500_000  # of a data file of Iceberg
_DECIMAL_OF_UINT64 = pa.decimal128(20, 0)


@dataclass(frozen=True)
class TableExport:
    """A run's captions on their way to a table."""

    captions: Captions
    run_id: str

    @property
    def name(self) -> str:
        """Tells the rows of this run from those of others, and from its own while it goes on."""
        return f"{self.run_id}/{self.captions.fingerprint()}"

    @property
    def schema(self) -> pa.Schema:
        """The table's columns."""
        return table_schema(self.captions.schema)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yields the rows as the table has them."""
        for batch in self.captions:
            # Only times lose digits: the formats have microseconds.
            yield from pa.Table.from_batches([batch]).cast(self.schema, safe=False).to_batches()


def export_table(captions: Captions, run_id: str, kind: TableFormat, out: str) -> bool:
    """Makes a table hold the captions, and nothing else; returns whether it did so already.

    Args:
        captions: The rows, with the columns to write.
        run_id: The run's id.
        kind: The table's format.
        out: The folder or prefix of a Delta or Lance table; CATALOG.NAMESPACE.TABLE of an Iceberg table.

    Raises:
        ConfigError: The format's package is not installed, the catalogue is unknown, or what is there is another
            table than an export of this run.
        SchemaError: A part of the run is damaged.
        StorageError: The service fails, or another writer has changed the table meanwhile.
    """
    export = TableExport(captions, run_id)
    write = {"iceberg": _export_iceberg, "delta": _export_delta, "lance": _export_lance}[kind]

    def attempt() -> bool:  # a commit whose answer was lost is found by the next one
        with _package(kind):
            return write(export, out)

    return patiently(out, "write this table", attempt)


@contextmanager
def _package(kind: TableFormat) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f"An export to {kind} needs the package {_PACKAGES[kind]}.",
            where="--to",
            found=str(error),
            remedy=f"pip install 'smallcap[{kind}]'",
        ) from error


def _export_iceberg(export: TableExport, out: str) -> bool:
    from pyiceberg.exceptions import NamespaceAlreadyExistsError, NoSuchTableError

    catalog, identifier = _iceberg_catalog(out)
    try:
        table = catalog.load_table(identifier)
    except NoSuchTableError:
        table = None
    if table is not None:
        _check_run(export, out, table.properties.get(RUN))
        if table.properties.get(EXPORT) == export.name:
            return True
        if table.schema().as_arrow().names != export.schema.names:
            raise ConfigError(
                "The table has other columns.",
                where=out,
                expected=", ".join(export.schema.names),
                found=", ".join(table.schema().as_arrow().names),
                remedy="Drop the table, or export to another one.",
            )
    with _Stream(export) as stream:
        if table is None:
            for depth in range(1, len(identifier)):
                try:
                    catalog.create_namespace(identifier[:depth])
                except NamespaceAlreadyExistsError:
                    continue
            table = catalog.create_table(identifier, export.schema, properties={RUN: export.run_id})
        files = list(_iceberg_files(table, export, stream))
        with table.transaction() as commit:
            if table.current_snapshot() is not None:
                commit.delete("true", snapshot_properties={EXPORT: export.name})
            commit.add_files(files, snapshot_properties={EXPORT: export.name})
            commit.set_properties({EXPORT: export.name})
    return False


def _iceberg_catalog(out: str) -> tuple[Any, tuple[str, ...]]:
    from pyiceberg.catalog import load_catalog

    name, *identifier = out.split(".")
    if len(identifier) < 2 or not all((name, *identifier)):
        raise ConfigError(
            "This names no Iceberg table.", where="--out", expected="CATALOG.NAMESPACE.TABLE", found=repr(out)
        )
    try:
        return load_catalog(name), tuple(identifier)
    except Exception as error:  # each kind of catalogue has its own
        raise ConfigError(
            "The Iceberg catalogue cannot be opened.",
            where=name,
            found=f"{type(error).__name__}: {error}",
            remedy=f"Describe it in ~/.pyiceberg.yaml, or set PYICEBERG_CATALOG__{name.upper()}__URI and what else it "
            "needs.",
        ) from error


def _iceberg_files(table: Any, export: TableExport, batches: Iterator[pa.RecordBatch]) -> Iterator[str]:
    """Writes the data files one after the other, and yields their places.

    pyiceberg would read the stream as fast as it can, and hold what is not written yet.
    """
    batch = next(batches, None)
    writing = uuid.uuid4().hex
    number = 0
    while batch is not None:
        place = table.location_provider().new_data_location(f"{export.run_id}-{writing}-{number:05d}.parquet")
        number += 1
        rows = 0
        with (
            table.io.new_output(place).create() as file,
            pq.ParquetWriter(file, export.schema, compression="zstd") as parquet,
        ):
            while batch is not None and rows < _FILE_ROWS:
                parquet.write_batch(batch)
                rows += len(batch)
                batch = next(batches, None)
        yield place


def _export_delta(export: TableExport, out: str) -> bool:
    from deltalake import CommitProperties, DeltaTable, Schema, write_deltalake

    uri, options = storage.absolute(out), s3_settings(out)
    description = f"Captions of the smallcap run {export.run_id}"
    if _is_taken(uri, "_delta_log"):
        table = DeltaTable(uri, storage_options=options)
        last = table.history(1)[0]
        _check_run(export, out, export.run_id if table.metadata().description == description else None)
        if last.get(EXPORT) == export.name:
            return True
    else:
        DeltaTable.create(uri, Schema.from_arrow(export.schema), description=description, storage_options=options)
    with _Stream(export) as stream:
        write_deltalake(
            uri,
            stream.reader(export.schema),
            mode="overwrite",
            schema_mode="overwrite",
            storage_options=options,
            commit_properties=CommitProperties(custom_metadata={RUN: export.run_id, EXPORT: export.name}),
        )
    return False


def _export_lance(export: TableExport, out: str) -> bool:
    import lance

    uri, options = storage.absolute(out), s3_settings(out)
    named = {RUN: export.run_id, EXPORT: export.name}
    if _is_taken(uri, "_versions"):
        metadata = lance.dataset(uri, storage_options=options).schema.metadata or {}
        _check_run(export, out, metadata.get(RUN.encode(), b"").decode())
        if metadata.get(EXPORT.encode()) == export.name.encode():
            return True
    else:
        empty = export.schema.with_metadata({RUN: export.run_id}).empty_table()
        lance.write_dataset(empty, uri, mode="create", storage_options=options)
    with _Stream(export) as stream:
        rows = stream.reader(export.schema.with_metadata(named))
        lance.write_dataset(rows, uri, mode="overwrite", storage_options=options)
    return False


def _is_taken(uri: str, marker: str) -> bool:
    """Says whether a table is in a folder, by the name of what its format writes there.

    Raises:
        ConfigError: Something else is there.
    """
    if storage.exists(storage.join(uri, marker)):
        return True
    check_empty(uri)
    return False


def check_empty(uri: str) -> None:
    """Checks that nothing is in a folder to which an export is about to write.

    Raises:
        ConfigError: Something is there.
    """
    found = [entry.rpartition("/")[2] for entry in storage.list_folder(uri)]
    if found:
        raise ConfigError(
            "The folder is not empty, and no export of smallcap is in it.",
            where=uri,
            expected="a new folder, or one with an earlier export of the same run",
            found=", ".join(found[:3]),
            remedy="Export to another folder.",
        )


def _check_run(export: TableExport, out: str, run_id: str | None) -> None:
    if run_id != export.run_id:
        raise other_run(out, export.run_id, run_id)


def other_run(out: str, run_id: str, found: str | None) -> ConfigError:
    """Returns the error of a place that is not an export of this run."""
    return ConfigError(
        "What is there is not an export of this run, and would be replaced.",
        where=out,
        expected=f"nothing, or an export of run {run_id}",
        found=f"an export of run {found}" if found else "something that smallcap did not write",
        remedy="Export to another place.",
    )


class _Stream:
    """The rows as a library reads them; an error of smallcap on the way is raised again as it was.

    The libraries call it from other languages and threads, where exceptions become texts.
    """

    def __init__(self, export: TableExport) -> None:
        self._batches = export.batches()
        self._error: SmallCapError | None = None

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and self._error is not None:
            raise self._error from error

    def __iter__(self) -> _Stream:
        return self

    def __next__(self) -> pa.RecordBatch:
        try:
            return next(self._batches)
        except SmallCapError as error:
            self._error = error
            raise

    def reader(self, schema: pa.Schema) -> pa.RecordBatchReader:
        """Returns the rows as an Arrow stream."""
        return pa.RecordBatchReader.from_batches(schema, self)


def table_schema(schema: pa.Schema) -> pa.Schema:
    """Returns columns of types that all three formats have, wide enough for every value but nanoseconds."""
    return pa.schema([pa.field(field.name, _plain(field.type), field.nullable) for field in schema])


_PLAIN: tuple[tuple[Callable[[pa.DataType], bool], pa.DataType], ...] = (
    (lambda kind: kind in (pa.int8(), pa.int16(), pa.uint8(), pa.uint16()), pa.int32()),
    (lambda kind: kind == pa.uint32(), pa.int64()),
    (lambda kind: kind == pa.uint64(), _DECIMAL_OF_UINT64),
    (pa.types.is_float16, pa.float32()),
    (pa.types.is_date, pa.date32()),
    (pa.types.is_duration, pa.int64()),
    (lambda kind: pa.types.is_large_string(kind) or pa.types.is_string_view(kind), pa.string()),
    (lambda kind: pa.types.is_null(kind) or pa.types.is_time(kind) or pa.types.is_decimal256(kind), pa.string()),
    (lambda kind: pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind), pa.binary()),
    (pa.types.is_binary_view, pa.binary()),
)


def _plain(kind: pa.DataType) -> pa.DataType:
    """Returns the type in which the tables have a type of Arrow's; durations become numbers of their unit."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", "UTC" if kind.tz else None)
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, _plain(field.type), field.nullable) for field in kind])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(_plain(kind.value_type))
    return next((plain for fits, plain in _PLAIN if fits(kind)), kind)
