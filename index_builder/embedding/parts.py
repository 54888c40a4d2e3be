"""Embeds the unique captions in actors, in parts of fixed id ranges; what has an embedding already keeps it.

A part is the same captions in the same batches whatever the number of actors and shards, so that fp32 rounding, which
depends on a batch's composition, is the same as well.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from index_builder.dumps.buckets import UniqueCaptions
from smallcap import storage
from smallcap.errors import CheckpointError, RunError
from smallcap.index.manifest import EncoderIdentity

if TYPE_CHECKING:
    from smallcap.model.clip_encoder import RetrievalEncoder

PART_ROWS = 8192
_UNIT_TOLERANCE = 1e-3
_PROBED_ROWS = 512


class EmbedParts:
    """Embeds parts and writes them; one instance per actor.

    Args:
        encoder: The retrieval encoder; None where every caption has its embedding.
        device: Torch device.
        dtype: Precision of the encoder's weights; vectors are float32.
        captions: What to embed.
        vectors: Where to write.

    Raises:
        CheckpointError: The encoder cannot be loaded, or has other weights than the build began with.
    """

    def __init__(
        self, encoder: EncoderIdentity | None, device: str, dtype: str, captions: UniqueCaptions, vectors: VectorParts
    ) -> None:
        self._encoder = None if encoder is None else _load_encoder(encoder, device, dtype)
        self._captions, self._vectors = captions, vectors

    def __call__(self, part: int) -> int:
        """Embeds one part; returns its number of captions."""
        first_row = part * PART_ROWS
        captions = self._captions.read(first_row, first_row + self._vectors.rows_of(part))
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
        self._vectors.write(part, vectors)
        return len(texts)


class ProbeEncoder:
    """Tries an encoder on a few captions, before all are embedded; the arguments are those of `EmbedParts`."""

    def __init__(self, encoder: EncoderIdentity, device: str, dtype: str, captions: UniqueCaptions) -> None:
        self._encoder, self._captions = _load_encoder(encoder, device, dtype), captions

    def __call__(self, first_row: int) -> Probe:
        """Embeds captions from a row on twice, and compares those that brought an embedding with it."""
        captions = self._captions.read(first_row, min(first_row + _PROBED_ROWS, len(self._captions)))
        texts, known = captions["text"].to_pylist(), captions["vector"].to_pylist()
        self._encoder.encode_texts(texts)  # once unmeasured
        start = time.perf_counter()
        vectors = self._encoder.encode_texts(texts)
        seconds = (time.perf_counter() - start) / len(texts)
        brought = [(row, _decode(vector, self._encoder.dim)) for row, vector in enumerate(known) if vector is not None]
        return Probe(seconds, [float(vectors[row] @ vector) for row, vector in brought])


@dataclass(frozen=True)
class Probe:
    """What `ProbeEncoder` found."""

    seconds_per_caption: float
    cosines: list[float]  # of the embeddings that captions brought with the encoder's own


def _load_encoder(expected: EncoderIdentity, device: str, dtype: str) -> RetrievalEncoder:
    from smallcap.model.clip_encoder import (
        load_retrieval_encoder,  # torch, which the other stages' workers need not load
    )

    encoder = load_retrieval_encoder(expected.spec, device=device, dtype=dtype)
    if encoder.identity.weights_sha256 != expected.weights_sha256:
        raise CheckpointError(
            "The retrieval encoder has other weights here.",
            where=expected.spec,
            expected=f"weights {expected.weights_sha256[:12]}",
            found=f"weights {encoder.identity.weights_sha256[:12]}",
            remedy="Give --encoder the encoder that made the index, or rebuild the index from its dumps.",
        )
    return encoder


def _decode(vector: bytes, dim: int) -> np.ndarray:
    """Returns a vector that a row carried: float16 or float32, as its length tells."""
    return np.frombuffer(vector, np.float16 if len(vector) == 2 * dim else np.float32).astype(np.float32)


def _check_unit(vectors: np.ndarray, first_id: int) -> None:
    wrong = np.flatnonzero(~(np.abs(np.linalg.norm(vectors, axis=1) - 1) < _UNIT_TOLERANCE))  # also NaN
    if wrong.size:
        raise RunError(
            "There are embeddings that are no unit vectors.",
            where=f"caption {first_id + wrong[0]}",
            expected="norm 1",
            found=f"norm {np.linalg.norm(vectors[wrong[0]])}, and {wrong.size - 1} more of {len(vectors)}",
            remedy="Check the encoder's weights, or use compute.dtype=float32.",
        )


class VectorParts:
    """The embeddings of a build's new captions, in part files of PART_ROWS rows.

    Args:
        work_uri: The build's work folder.
        rows: Captions.
        dim: Length of a vector.
    """

    def __init__(self, work_uri: str, rows: int, dim: int) -> None:
        self._folder, self._rows, self.dim = storage.join(work_uri, "embeddings"), rows, dim

    def __len__(self) -> int:
        return self._rows

    @property
    def count(self) -> int:
        """Number of parts."""
        return -(-self._rows // PART_ROWS)

    def rows_of(self, part: int) -> int:
        """Returns the number of rows of a part."""
        return min(PART_ROWS, self._rows - part * PART_ROWS)

    def missing(self) -> list[int]:
        """Returns the parts that have not been written; an interrupted build has left the others."""
        there = set(storage.list_files(self._folder)) if storage.exists(self._folder) else set()
        return [part for part in range(self.count) if self._uri(part) not in there]

    def write(self, part: int, vectors: np.ndarray) -> None:
        """Writes one part; vectors: [rows, dim] float32."""
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(vectors, dtype=np.float32))
        storage.write_bytes(self._uri(part), buffer.getvalue())

    def read(self, first_row: int, stop_row: int) -> Iterator[np.ndarray]:
        """Yields the vectors of rows [first_row, stop_row) in order, at most a part at a time."""
        for part in range(first_row // PART_ROWS, -(-stop_row // PART_ROWS)):
            start = part * PART_ROWS
            yield self._load(part)[max(first_row - start, 0) : stop_row - start]

    def take(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns the vectors of some rows, which must be sorted, as [len(rows), dim] float32."""
        wanted = np.asarray(rows, dtype=np.int64)
        pieces = [np.zeros((0, self.dim), np.float32)]
        parts = wanted // PART_ROWS
        for part in np.unique(parts):
            pieces.append(self._load(part)[wanted[parts == part] - part * PART_ROWS])
        return np.concatenate(pieces)

    def _load(self, part: int) -> np.ndarray:
        vectors: np.ndarray = np.load(io.BytesIO(storage.read_bytes(self._uri(part))), allow_pickle=False)
        return vectors

    def _uri(self, part: int) -> str:
        return storage.join(self._folder, f"part-{part:05d}.npy")
