"""Embeds the unique captions in actors, in parts of fixed id ranges.

A part is the same captions in the same batches whatever the number of actors and shards, so that fp32 rounding, which
depends on a batch's composition, is the same as well.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np

from index_builder.buckets import UniqueCaptions
from smallcap import storage
from smallcap.errors import RunError

PART_ROWS = 8192
_UNIT_TOLERANCE = 1e-3


class EmbedParts:
    """Embeds parts and writes them; one instance per actor.

    Args:
        spec: The retrieval encoder.
        device: Torch device.
        dtype: Precision of the encoder's weights; vectors are float32.
        captions: What to embed.
        work_uri: The build's work folder.
    """

    def __init__(self, spec: str, device: str, dtype: str, captions: UniqueCaptions, work_uri: str) -> None:
        from smallcap.clip_encoder import load_retrieval_encoder  # torch, which the other stages' workers need not load

        self._encoder = load_retrieval_encoder(spec, device=device, dtype=dtype)
        self._captions = captions
        self._vectors = VectorParts(work_uri, len(captions), self._encoder.dim)

    def __call__(self, part: int) -> int:
        """Embeds one part; returns its number of captions."""
        first_id = part * PART_ROWS
        stop_id = min(first_id + PART_ROWS, len(self._captions))
        texts = self._captions.read(first_id, stop_id)["text"].to_pylist()
        vectors = self._encoder.encode_texts(texts)
        self._check(vectors, first_id)
        self._vectors.write(part, vectors)
        return len(texts)

    def _check(self, vectors: np.ndarray, first_id: int) -> None:
        wrong = np.flatnonzero(~(np.abs(np.linalg.norm(vectors, axis=1) - 1) < _UNIT_TOLERANCE))  # also NaN
        if wrong.size:
            raise RunError(
                "The encoder gave embeddings that are no unit vectors.",
                where=f"caption {first_id + wrong[0]}",
                expected="norm 1",
                found=f"norm {np.linalg.norm(vectors[wrong[0]])}, and {wrong.size - 1} more of {len(vectors)}",
                remedy="Check the encoder's weights, or use compute.dtype=float32.",
            )


class VectorParts:
    """The embeddings of a build by global id, in part files of PART_ROWS rows."""

    def __init__(self, work_uri: str, rows: int, dim: int) -> None:
        self._work_uri, self._rows, self.dim = work_uri, rows, dim

    @property
    def count(self) -> int:
        """Number of parts."""
        return -(-self._rows // PART_ROWS)

    def write(self, part: int, vectors: np.ndarray) -> None:
        """Writes one part; vectors: [rows, dim] float32."""
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(vectors, dtype=np.float32))
        storage.write_bytes(self._uri(part), buffer.getvalue())

    def read(self, first_id: int, stop_id: int) -> Iterator[np.ndarray]:
        """Yields the vectors with ids in [first_id, stop_id) in order, at most a part at a time."""
        for part in range(first_id // PART_ROWS, -(-stop_id // PART_ROWS)):
            start = part * PART_ROWS
            vectors: np.ndarray = np.load(io.BytesIO(storage.read_bytes(self._uri(part))))
            yield vectors[max(first_id - start, 0) : stop_id - start]

    def _uri(self, part: int) -> str:
        return storage.join(self._work_uri, "embeddings", f"part-{part:05d}.npy")
