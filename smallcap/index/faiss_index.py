"""What smallcap needs from faiss: one working package, the kinds of index it reads, and how a file becomes an index.

It takes only files whose sha256 `node_cache` has checked, and in which it has found no on-disk lists.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import faiss

from smallcap.errors import IndexIntegrityError, RunError

# The keys whose shards keep float32 or float16 vectors. Every other key has coarser codes, or a search that cannot be
# repeated exactly; its candidates are ranked again from the `vectors` files.
_LOSSLESS = re.compile(r"Flat|IVF\d+(_HNSW\d+)?,(Flat|SQfp16)")

# The first bytes of a readable file. faiss opens no other file for these kinds, and the tests search each of them.
_FOURCC = {
    b"IxFI": "Flat",
    b"IxSQ": "SQ",
    b"IxPq": "PQ",
    b"IPfs": "PQ, fast scan",
    b"Ixrq": "RaBitQ",
    b"Ixrr": "RaBitQ of several bits",
    b"IHNf": "HNSW",
    b"IHNs": "HNSW over SQ",
    b"IHNp": "HNSW over PQ",
    b"IwFl": "IVF,Flat",
    b"IwSq": "IVF,SQ",
    b"IwPQ": "IVF,PQ",
    b"IwPf": "IVF,PQ, fast scan",
    b"Iwrq": "IVF,RaBitQ",
    b"Iwrr": "IVF,RaBitQ of several bits",
    b"IxPT": "a transform before an index",
}
_FOURCC_OF_LOSSLESS = {"Flat": b"IxFI", "IVF,Flat": b"IwFl", "IVF,SQfp16": b"IwSq"}
_NEEDED_NAMES = ("IO_FLAG_MMAP_IFC", "read_index", "IndexFlatIP", "SearchParametersHNSW", "rev_swig_ptr")


def is_lossy(index_key: str) -> bool:
    """Says whether an index of this key gives only candidates, which are ranked again from `vectors` files."""
    return _LOSSLESS.fullmatch(index_key) is None


def check_faiss() -> None:
    """Checks that one working faiss is installed, and chooses BLAS for batches of every size.

    Raises:
        RunError: faiss lacks a needed name, typically because two of its packages overwrote each other.
    """
    missing = [name for name in _NEEDED_NAMES if not hasattr(faiss, name)]
    if missing:
        raise RunError(
            "The installed faiss is broken or too old.",
            where=str(getattr(faiss, "__file__", None)),
            found=f"no {', '.join(missing)}",
            remedy="Uninstall every faiss package, then install one, 1.15 or newer: faiss-gpu-cuvs on x86-64 Linux, or "
            "faiss-cpu.",
        )
    # By default faiss uses BLAS only from nq·d = 128000 on: usual batches would take 10-20 times longer on few threads.
    faiss.cvar.distance_compute_blas_threshold = 1


def read_index(file: Path, index_key: str) -> Any:
    """Memory-maps a faiss index of inner products.

    Args:
        file: The local path of a file whose sha256 has been checked.
        index_key: The manifest's key.

    Returns:
        The index, as an object of its faiss class.

    Raises:
        IndexIntegrityError: Its kind contradicts the key, or this release does not read it, or the file is damaged.
    """
    with file.open("rb") as opened:
        fourcc = opened.read(4)
    family = re.sub(r"\d+(_HNSW\d+)?,", ",", index_key, count=1)
    expected = [_FOURCC_OF_LOSSLESS[family]] if not is_lossy(index_key) else list(_FOURCC)
    if fourcc not in expected:
        raise _wrong_kind(file, index_key, f"{fourcc!r} ({_FOURCC.get(fourcc, 'unknown')})")
    try:
        index: Any = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise IndexIntegrityError("faiss cannot read a shard.", where=str(file), found=str(error)) from error
    if family == "IVF,SQfp16" and index.sq.qtype != faiss.ScalarQuantizer.QT_fp16:
        raise _wrong_kind(file, index_key, f"a scalar quantizer of type {index.sq.qtype}")
    return index


def _wrong_kind(file: Path, index_key: str, found: str) -> IndexIntegrityError:
    return IndexIntegrityError(
        "The kind of a shard contradicts the manifest's key, or this release does not read it.",
        where=str(file),
        expected=index_key,
        found=found,
        remedy="Upgrade smallcap, or rebuild the index.",
    )


def transforms_of(index: Any) -> list[Any]:
    """Returns the transforms that an index applies to its vectors, first to last; most indexes have none."""
    if not isinstance(index, faiss.IndexPreTransform):
        return []
    chain: Any = index.chain
    return [faiss.downcast_VectorTransform(chain.at(number)) for number in range(chain.size())]


def is_flat(index: Any) -> bool:
    """Says whether an index keeps float32 vectors and compares all of them by their inner product."""
    return isinstance(index, faiss.IndexFlat) and index.metric_type == faiss.METRIC_INNER_PRODUCT


def inverted_file_of(index: Any) -> Any | None:
    """Returns the inverted file that an index is or transforms into; None where there is none."""
    while isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    return index if isinstance(index, faiss.IndexIVF) else None


def is_readable(index: Any) -> bool:
    """Says whether `read_index` can read an index after faiss has written it to a file."""
    return bytes(faiss.serialize_index(index)[:4]) in _FOURCC
