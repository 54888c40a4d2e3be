"""Dumps that keep captions and embeddings in separate files: finds which files pair up, and reads their rows.

clip-retrieval writes `text_emb/text_emb_0.npy` and `metadata/metadata_0.parquet`; autofaiss and embedding-reader take
`embeddings/*.npy` and `metadata/*.parquet`; the SmallCap reference's datastore is `NAME`, a faiss index of unit
vectors, and `NAME_captions.json`, the list of its texts (RitaRamo/smallcap src/retrieve_caps.py). Row i of one file
belongs to row i of the other. A folder of image embeddings (`img_emb`) is never mistaken for text embeddings.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from tokenize import TokenError
from typing import IO

import numpy as np

from smallcap import storage
from smallcap.captions.json_files import list_rows, load_json
from smallcap.captions.parquet import open_parquet, read_parquet
from smallcap.captions.rows import CaptionColumns, CaptionRow
from smallcap.captions.vectors import ROWS_AT_ONCE, check_dim, unit_vectors
from smallcap.errors import ConfigError, IndexIntegrityError, SchemaError

_LAYOUTS = (  # paths of the embeddings and of the captions, below the folder
    (re.compile(r"text_emb/text_emb_\d+\.npy"), re.compile(r"metadata/metadata_\d+\.parquet")),
    (re.compile(r"embeddings/[^/]+\.npy"), re.compile(r"metadata/[^/]+\.parquet")),
)
_LAST_NUMBER = re.compile(r"(\d+)\D*$")
_DATASTORE_CAPTIONS = "_captions.json"
_FLAT_INNER_PRODUCT, _INNER_PRODUCT = b"IxFI", 0  # faiss's code for the index, which comes first in the file; a metric
_HEADER = struct.Struct("<4xiq16xxiQ")  # d, ntotal, metric, how many numbers follow


def find_embeddings(folder: str, files: Sequence[str]) -> dict[str, str]:
    """Finds a folder's caption files whose embeddings are in another file.

    Args:
        folder: URI of a folder or prefix.
        files: URIs of all files below it.

    Returns:
        The URI of the embeddings by the URI of the captions.

    Raises:
        ConfigError: The folder is laid out for pairs, and a file has no match.
        StorageError: A file cannot be read.
    """
    inside = {file.removeprefix(f"{folder}/"): file for file in files if file.startswith(f"{folder}/")}
    found = {}
    for embeddings, captions in _LAYOUTS:
        left = [name for name in inside if embeddings.fullmatch(name)]
        right = [name for name in inside if captions.fullmatch(name)]
        if left and right:
            found = {inside[name]: inside[other] for other, name in _pair_by_number(left, right, folder)}
            break
    for name, file in inside.items():
        index = name.removesuffix(_DATASTORE_CAPTIONS)
        if index != name and "/" not in index and index in inside and _holds_a_list(file):
            found[file] = inside[index]
    return found


def _pair_by_number(embeddings: Sequence[str], captions: Sequence[str], folder: str) -> list[tuple[str, str]]:
    """Pairs the names of two subfolders by the last number in each, leading zeros ignored."""
    halves: list[dict[int, list[str]]] = [{}, {}]
    for half, names in zip(halves, (embeddings, captions), strict=True):
        for name in names:
            match = _LAST_NUMBER.search(name.rpartition("/")[2].rpartition(".")[0])
            half.setdefault(int(match[1]) if match else -1, []).append(name)
    groups = [(halves[0].get(number, []), halves[1].get(number, [])) for number in sorted({*halves[0], *halves[1]})]
    for left, right in groups:
        if (len(left), len(right)) != (1, 1):
            raise ConfigError(
                "The folder's embeddings and captions do not pair up.",
                where=folder,
                expected="one file of embeddings and one of captions for each number in their names",
                found=", ".join([*left, *right]),
                remedy="Add or remove the missing half, or rename the files.",
            )
    return [(left, right) for [left], [right] in groups]


def _holds_a_list(uri: str) -> bool:
    """Returns whether a JSON file is a list; COCO's captions, which may have the same name, are an object."""
    with storage.open_ranged(uri) as file:
        return bool(file.read(64).lstrip().startswith(b"["))


def read_embedded_rows(
    captions: IO[bytes], captions_uri: str, embeddings: Path, embeddings_uri: str, columns: CaptionColumns
) -> Iterator[CaptionRow]:
    """Reads the rows of a pair of files in order.

    Args:
        captions: A Parquet file, or a JSON list of texts.
        captions_uri: The captions' URI, for errors.
        embeddings: Local copy of the embeddings: a .npy file for Parquet, a faiss index for JSON.
        embeddings_uri: The embeddings' URI, for errors.
        columns: The columns to read; an embedding column is ignored.

    Raises:
        SchemaError: A file has the wrong content, or the files differ in their number of rows.
        IndexIntegrityError: The faiss index is damaged or of another kind.
    """
    if storage.suffix_of(captions_uri) == ".json":
        texts = load_json(captions, captions_uri)
        if not isinstance(texts, list):
            kind = type(texts).__name__
            raise SchemaError("This JSON file is not a list of captions.", where=captions_uri, found=kind)
        rows, count = list_rows(texts), len(texts)
        matrix = _open_flat_index(embeddings, embeddings_uri, columns.dim)
    else:
        count = open_parquet(captions, captions_uri).metadata.num_rows
        rows = read_parquet(captions, captions_uri, columns._replace(embedding=None, several=False))
        matrix = _open_npy(embeddings, embeddings_uri, columns.dim)
    if count != len(matrix):
        raise SchemaError(
            "The dump does not have one embedding for each caption.",
            where=embeddings_uri,
            expected=f"{count} embeddings, one for each caption of {captions_uri}",
            found=str(len(matrix)),
            remedy="Write both files again together; one of them may come from another run.",
        )
    return _joined(rows, matrix)


def _joined(rows: Iterator[CaptionRow], matrix: np.ndarray) -> Iterator[CaptionRow]:
    for start in range(0, len(matrix), ROWS_AT_ONCE):
        for vector, row in zip(unit_vectors(matrix[start : start + ROWS_AT_ONCE]), rows, strict=False):
            yield row._replace(vector=vector, problem=row.problem or ("" if vector else "bad_embedding"))


def _open_npy(path: Path, uri: str, dim: int | None) -> np.ndarray:
    """Maps a matrix into memory; a .npy file with pickled objects is refused."""
    try:
        matrix: np.ndarray = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, TypeError, OverflowError, SyntaxError, TokenError, OSError) as error:  # headers are Python
        raise SchemaError("This is not a .npy file of numbers.", where=uri, found=str(error)) from error
    if matrix.ndim != 2 or matrix.dtype.kind != "f" or matrix.dtype.itemsize not in (2, 4, 8):
        raise SchemaError(
            "The embeddings have the wrong shape or type.",
            where=uri,
            expected="[rows, dim] of float16, float32 or float64",
            found=f"{list(matrix.shape)} of {matrix.dtype}",
        )
    check_dim(matrix.shape[1], dim, uri)
    return matrix


def _open_flat_index(path: Path, uri: str, dim: int | None) -> np.ndarray:
    """Maps the vectors of a faiss `IndexFlatIP` into memory.

    Nothing vouches for this file, so faiss does not read it: faiss follows paths that some kinds of index name, and
    crashes on some damaged headers. Source: facebookresearch/faiss impl/index_write.cpp `write_index_header`.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if header[:4] != _FLAT_INNER_PRODUCT:
        raise IndexIntegrityError(
            "The vectors of this kind of faiss index cannot be imported.",
            where=uri,
            expected=f"a flat faiss index of inner products ({_FLAT_INNER_PRODUCT!r})",
            found=repr(header[:4]),
            remedy="Give the file of captions instead of its folder, to embed them again.",
        )
    d, ntotal, metric, numbers = _HEADER.unpack(header.ljust(_HEADER.size, b"\0"))
    if metric != _INNER_PRODUCT or d < 1 or ntotal < 0 or (numbers, size) != (d * ntotal, _HEADER.size + 4 * numbers):
        raise IndexIntegrityError(
            "The datastore's index is damaged, or does not use inner products.",
            where=uri,
            expected=f"metric {_INNER_PRODUCT}, and {_HEADER.size} + 4 · ntotal · d bytes",
            found=f"metric {metric}, {size} bytes, ntotal {ntotal}, d {d}",
            remedy="Copy the file again.",
        )
    check_dim(d, dim, uri)
    if not ntotal:
        return np.empty((0, d), np.float32)
    return np.memmap(path, "<f4", "r", offset=_HEADER.size, shape=(ntotal, d))
