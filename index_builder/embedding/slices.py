"""Embeds the unique captions in actors, in slices of fixed id ranges; captions that have an embedding keep it.

Whatever the number of actors and shards, a slice has the same captions in the same batches. Float32 rounding depends on
the composition of a batch, so it is the same as well.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from index_builder.dumps.buckets import UniqueCaptions
from smallcap import storage
from smallcap.errors import CheckpointError, RunError
from smallcap.index.manifest import EncoderIdentity

if TYPE_CHECKING:
    from smallcap.model.clip_encoder import RetrievalEncoder

SLICE_ROWS = 8192
_UNIT_TOLERANCE = 1e-3
_PROBED_ROWS = 512


class CachedEncoder(NamedTuple):
    """The build's retrieval encoder, and each node's cache folder for a copy of it."""

    identity: EncoderIdentity
    cache_dir: str


class EmbedSlices:
    """Embeds slices of the captions and writes them; one instance per actor.

    Args:
        encoder: The retrieval encoder; None where every caption has an embedding.
        device: Torch device.
        dtype: Precision of the encoder's weights; vectors are float32.
        captions: The captions.
        vectors: Where the embeddings are written.

    Raises:
        CheckpointError: The encoder cannot be loaded, or its weights differ from those that the build began with.
    """

    def __init__(
        self, encoder: CachedEncoder | None, device: str, dtype: str, captions: UniqueCaptions, vectors: VectorSlices
    ) -> None:
        self._encoder = None if encoder is None else _load_encoder(encoder, device, dtype)
        self._captions, self._vectors = captions, vectors

    def __call__(self, number: int) -> int:
        """Embeds a slice, given by its number; returns how many captions it has."""
        first_row = number * SLICE_ROWS
        captions = self._captions.read(first_row, first_row + self._vectors.rows_of(number))
        texts, known = captions["text"].to_pylist(), captions["vector"].to_pylist()
        missing = [row for row, vector in enumerate(known) if vector is None]
        vectors = np.empty((len(texts), self._vectors.dim), np.float32)
        if missing:
            assert self._encoder is not None
            vectors[missing] = self._encoder.encode_texts([texts[row] for row in missing])
        for row, vector in enumerate(known):
            if vector is not None:
                vectors[row] = _decode(vector, self._vectors.dim)
        _check_unit(vectors, first_row)
        self._vectors.write(number, vectors)
        return len(texts)


class ProbeEncoder:
    """Tries an encoder on a few captions before all are embedded; see `EmbedSlices` for the arguments."""

    def __init__(self, encoder: CachedEncoder, device: str, dtype: str, captions: UniqueCaptions) -> None:
        self._encoder, self._captions = _load_encoder(encoder, device, dtype), captions

    def __call__(self, first_row: int) -> Probe:
        """Embeds a few captions from `first_row` on, twice, and compares the results with imported embeddings."""
        captions = self._captions.read(first_row, min(first_row + _PROBED_ROWS, len(self._captions)))
        texts, known = captions["text"].to_pylist(), captions["vector"].to_pylist()
        self._encoder.encode_texts(texts)  # once unmeasured
        start = time.perf_counter()
        vectors = self._encoder.encode_texts(texts)
        seconds = (time.perf_counter() - start) / len(texts)
        imported = [(row, _decode(vector, self._encoder.dim)) for row, vector in enumerate(known) if vector is not None]
        return Probe(seconds, [float(vectors[row] @ vector) for row, vector in imported])


@dataclass(frozen=True)
class Probe:
    """The result of `ProbeEncoder`."""

    seconds_per_caption: float
    cosines: list[float]  # between imported embeddings and the encoder's


def _load_encoder(cached: CachedEncoder, device: str, dtype: str) -> RetrievalEncoder:
    from smallcap.model.clip_encoder import (
        load_retrieval_encoder,  # torch, which the other stages' workers need not load
    )

    expected = cached.identity
    encoder = load_retrieval_encoder(expected.spec, device, dtype, cached.cache_dir)
    if encoder.identity.weights_sha256 != expected.weights_sha256:
        raise CheckpointError(
            "The retrieval encoder has different weights here.",
            where=expected.spec,
            expected=f"weights {expected.weights_sha256[:12]}",
            found=f"weights {encoder.identity.weights_sha256[:12]}",
            remedy="Give --encoder the encoder that made the index, or rebuild the index from its dumps.",
        )
    return encoder


def _decode(vector: bytes, dim: int) -> np.ndarray:
    """Returns the vector that a row carries: float16 or float32, as its length tells."""
    return np.frombuffer(vector, np.float16 if len(vector) == 2 * dim else np.float32).astype(np.float32)


def _check_unit(vectors: np.ndarray, first_id: int) -> None:
    wrong = np.flatnonzero(~(np.abs(np.linalg.norm(vectors, axis=1) - 1) < _UNIT_TOLERANCE))  # true for NaN
    if wrong.size:
        raise RunError(
            "Some embeddings are not unit vectors.",
            where=f"caption {first_id + wrong[0]}",
            expected="norm 1",
            found=f"norm {np.linalg.norm(vectors[wrong[0]])}, and {wrong.size - 1} others of {len(vectors)}",
            remedy="Check the encoder's weights, or use compute.dtype=float32.",
        )


class VectorSlices:
    """The embeddings of a build's new captions, in one file for each slice of SLICE_ROWS rows.

    Args:
        work_uri: The build's work folder.
        rows: The number of captions.
        dim: Length of a vector.
    """

    def __init__(self, work_uri: str, rows: int, dim: int) -> None:
        self._folder, self._rows, self.dim = storage.join(work_uri, "embeddings"), rows, dim

    def __len__(self) -> int:
        return self._rows

    @property
    def count(self) -> int:
        """Number of slices."""
        return -(-self._rows // SLICE_ROWS)

    def rows_of(self, number: int) -> int:
        """Returns the number of rows in a slice."""
        return min(SLICE_ROWS, self._rows - number * SLICE_ROWS)

    def missing(self) -> list[int]:
        """Returns the numbers of the slices that an interrupted build has not written yet."""
        written = set(storage.list_files(self._folder)) if storage.exists(self._folder) else set()
        return [number for number in range(self.count) if self._uri(number) not in written]

    def write(self, number: int, vectors: np.ndarray) -> None:
        """Writes one slice; vectors: [rows, dim] float32."""
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(vectors, dtype=np.float32))
        storage.write_bytes(self._uri(number), buffer.getvalue())

    def read(self, first_row: int, stop_row: int) -> Iterator[np.ndarray]:
        """Yields the vectors of rows [first_row, stop_row) in order, at most a slice at a time."""
        for number in range(first_row // SLICE_ROWS, -(-stop_row // SLICE_ROWS)):
            start = number * SLICE_ROWS
            yield self._load(number)[max(first_row - start, 0) : stop_row - start]

    def take(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns the vectors of the given rows, which must be sorted, as [len(rows), dim] float32."""
        wanted = np.asarray(rows, dtype=np.int64)
        pieces = [np.zeros((0, self.dim), np.float32)]
        slices = wanted // SLICE_ROWS
        for number in np.unique(slices):
            pieces.append(self._load(number)[wanted[slices == number] - number * SLICE_ROWS])
        return np.concatenate(pieces)

    def _load(self, number: int) -> np.ndarray:
        vectors: np.ndarray = np.load(io.BytesIO(storage.read_bytes(self._uri(number))), allow_pickle=False)
        return vectors

    def _uri(self, number: int) -> str:
        return storage.join(self._folder, f"part-{number:05d}.npy")
