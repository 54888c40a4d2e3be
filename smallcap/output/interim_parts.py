"""Joins interim parts to full ones, and deletes those that a full part has replaced.

The writer of a run replaces its interim parts itself. What is left are those of attempts that were killed or stopped.
A full part appears whole, and from then on its interim parts do not count: whatever is interrupted here, each row
counts once, and is done again the next time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import pyarrow as pa

from smallcap import storage
from smallcap.output.parquet_files import read_parquet, write_parquet
from smallcap.output.part_files import (
    EMBEDDINGS_FOLDER,
    SIDECAR_FOLDERS,
    WEBDATASET_FOLDER,
    PartInfo,
    full_name,
    sidecar_uri,
    tell_parts,
    with_info,
    write_tar,
)
from smallcap.output.webdataset import join_samples


def remove_replaced(out: str) -> None:
    """Deletes the interim parts whose full part exists, and their sidecars."""
    remove_parts(out, (uri.rsplit("/", 1)[-1] for uri in tell_parts(out)[1]))


def remove_parts(out: str, names: Iterable[str]) -> None:
    """Deletes parts, each before its sidecars, which do not count without it."""
    for name in names:
        uris = [storage.join(out, name), *(sidecar_uri(out, folder, name) for folder in SIDECAR_FOLDERS)]
        for uri in uris:
            storage.remove(uri)


def join_interim_parts(out: str, parts: Sequence[tuple[str, PartInfo]], rows_per_row_group: int) -> None:
    """Joins the interim parts that killed attempts have left to full parts.

    No image has a row in two parts, and no id stands for two images. After an interruption the interim parts are still
    there, or they no longer count.

    Args:
        out: The output folder.
        parts: The names and infos of all parts that count.
        rows_per_row_group: Rows in a row group of the full parts.

    Raises:
        SchemaError: A part or a sidecar is damaged.
    """
    groups: dict[str, list[tuple[str, PartInfo]]] = {}
    for name, info in parts:
        if full := full_name(name):
            groups.setdefault(full, []).append((name, info))
    for full, group in groups.items():
        names = [name for name, _ in group]
        _join_embeddings(out, names, full, rows_per_row_group)
        _join_tars(out, names, full)
        rows = _joined_rows([storage.join(out, name) for name in names])
        info = PartInfo.joined([info for _, info in group])
        write_parquet(storage.join(out, full), with_info(rows, info), rows_per_row_group)
        remove_parts(out, names)


def _join_embeddings(out: str, names: Sequence[str], full: str, rows_per_row_group: int) -> None:
    uris = [uri for name in names if storage.exists(uri := sidecar_uri(out, EMBEDDINGS_FOLDER, name))]
    if uris:
        write_parquet(sidecar_uri(out, EMBEDDINGS_FOLDER, full), _joined_rows(uris), rows_per_row_group)


def _join_tars(out: str, names: Sequence[str], full: str) -> None:
    uris = [uri for name in names if storage.exists(uri := sidecar_uri(out, WEBDATASET_FOLDER, name))]
    with ExitStack() as local:
        paths = [local.enter_context(storage.local_file(uri)) for uri in uris]
        if paths:
            write_tar(sidecar_uri(out, WEBDATASET_FOLDER, full), lambda path: join_samples(paths, path))


def _joined_rows(uris: Sequence[str]) -> pa.Table:
    """Returns the rows of several files, sorted by image id."""
    return pa.concat_tables([read_parquet(uri)[0] for uri in uris]).sort_by("image_id")
