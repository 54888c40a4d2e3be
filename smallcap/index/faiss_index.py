"""What smallcap relies on of faiss: one working package, the kinds of index it reads, and how a file becomes an index.

Only files whose sha256 has been checked, and which `node_cache` has found to hold no on-disk lists, may come here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import faiss

from smallcap.errors import IndexIntegrityError, RunError

# The keys whose shards keep float32 or float16 vectors. Every other one has coarser codes, or a search that cannot be
# repeated exactly, and its candidates are ranked again from the `vectors` files.
_LOSSLESS = re.compile(r"Flat|IVF\d+(_HNSW\d+)?,(Flat|SQfp16)")

# What a readable file starts with. The list is of kinds whose readers open no other file, and that the tests search.
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
_NEEDED = ("IO_FLAG_MMAP_IFC", "read_index", "IndexFlatIP", "SearchParametersHNSW", "rev_swig_ptr")


def is_lossy(index_key: str) -> bool:
    """Says whether an index of this key answers with candidates only, which `vectors` files rank again."""
    return _LOSSLESS.fullmatch(index_key) is None


def check_faiss() -> None:
    """Checks that one working faiss is installed, and chooses BLAS for batches of every size.

    Raises:
        RunError: faiss lacks what it must have; typically two of its packages overwrote each other.
    """
    missing = [name for name in _NEEDED if not hasattr(faiss, name)]
    if missing:
        raise RunError(
            "The installed faiss is broken or too old.",
            where=str(getattr(faiss, "__file__", None)),
            found=f"no {', '.join(missing)}",
            remedy="Uninstall every faiss package, then install exactly one of faiss-gpu and faiss-cpu, 1.15 or newer.",
        )
    # By default BLAS is used from nq·d = 128000 on, which makes usual batches 10-20 times slower on few threads.
    faiss.cvar.distance_compute_blas_threshold = 1


def read_index(file: Path, index_key: str) -> Any:
    """Memory-maps a faiss index of inner products.

    Args:
        file: Local path; its sha256 has been checked.
        index_key: What the manifest says it is.

    Returns:
        The index, as its own class.

    Raises:
        IndexIntegrityError: It is of another kind than the key says or than this release reads, or cannot be read.
    """
    with file.open("rb") as opened:
        fourcc = opened.read(4)
    family = re.sub(r"\d+(_HNSW\d+)?,", ",", index_key, count=1)
    expected = [_FOURCC_OF_LOSSLESS[family]] if not is_lossy(index_key) else list(_FOURCC)
    if fourcc not in expected:
        raise _another_kind(file, index_key, f"{fourcc!r} ({_FOURCC.get(fourcc, 'unknown')})")
    try:
        index: Any = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise IndexIntegrityError("faiss cannot read a shard.", where=str(file), found=str(error)) from error
    if family == "IVF,SQfp16" and index.sq.qtype != faiss.ScalarQuantizer.QT_fp16:
        raise _another_kind(file, index_key, f"a scalar quantizer of type {index.sq.qtype}")
    return index


def _another_kind(file: Path, index_key: str, found: str) -> IndexIntegrityError:
    return IndexIntegrityError(
        "A shard is of another kind than the manifest's key, or of one that this release does not read.",
        where=str(file),
        expected=index_key,
        found=found,
        remedy="Upgrade smallcap, or rebuild the index.",
    )


def transforms_of(index: Any) -> list[Any]:
    """Returns the transforms that an index applies to its vectors, first to last; most have none."""
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
    """Says whether `read_index` will read what faiss writes of an index."""
    return bytes(faiss.serialize_index(index)[:4]) in _FOURCC
