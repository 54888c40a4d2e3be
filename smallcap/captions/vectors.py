"""Turns the embeddings of a dump into unit vectors as bytes; knows nothing of files and formats."""

from __future__ import annotations

import numpy as np

from smallcap.errors import SchemaError

ROWS_AT_ONCE = 1_000
"""Rows whose vectors are read together; a reader holds a few times as many in memory."""

_UNIT_TOLERANCE = 1e-3
_FLOATS = {2: "<f2", 4: "<f4", 8: "<f4"}  # from the size of a number that is read to the type that is kept


def unit_vectors(matrix: np.ndarray) -> list[bytes | None]:
    """Brings vectors to unit length; those that have it already stay as they are, bit by bit.

    Args:
        matrix: [rows, dim] float16, float32 or float64, in any byte order.

    Returns:
        Each row as raw little-endian bytes, float16 where the matrix is, else float32. None for a vector without a
        direction: one that is zero, or has a number that is not finite.
    """
    kept = np.dtype(_FLOATS[matrix.dtype.itemsize])
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        stored = np.ascontiguousarray(matrix, dtype=kept)
        rows = stored.astype(np.float32)
        largest = np.abs(rows).max(axis=1, initial=0)
        scaled = rows / largest[:, None]  # the square of a large number would not be finite
        norms = np.sqrt(np.einsum("ij,ij->i", scaled, scaled))
        has_direction = np.isfinite(norms)
        change = has_direction & ~(np.abs(norms * largest - 1) <= _UNIT_TOLERANCE)
        if change.any():
            stored = np.array(stored)  # it may be a view of a file
            stored[change] = scaled[change] / norms[change, None]
    return [vector.tobytes() if valid else None for vector, valid in zip(stored, has_direction.tolist(), strict=True)]


def check_dim(found: int, dim: int | None, where: str) -> None:
    """Checks the length of a dump's vectors; any length above 0 passes where `dim` is None.

    Raises:
        SchemaError: The length is wrong.
    """
    if found < 1 or (dim is not None and found != dim):
        raise SchemaError(
            "The dump's embeddings have the wrong length.",
            where=where,
            expected="at least one number" if dim is None else f"{dim} numbers in each",
            found=str(found),
            remedy="Name the encoder that made them with --encoder, or leave the embeddings out.",
        )
