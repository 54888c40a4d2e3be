"""Training examples in a shuffled order that depends only on seed and epoch, streamed from stored features.

An example is an image and one of its captions. A few parts at a time are held, and their examples shuffled together;
the order of the parts is shuffled as well. Every worker follows the same order and takes its share of each batch, so
that the examples of a step depend neither on the number of workers nor on where an epoch was interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice

import numpy as np

from smallcap import storage
from smallcap.training.feature_store import PartEntry, read_candidates, read_features
from smallcap.training.retrieval_sampling import RetrievalMode, choose_retrieved


@dataclass(frozen=True)
class Example:
    """One image with one of its captions."""

    image_id: str
    caption: str
    number: int  # of the caption within its image
    candidates: list[str]  # nearest first
    features: np.ndarray  # [P, Hv] float16

    def retrieved(self, k: int, mode: RetrievalMode, seed: Sequence[int]) -> list[str]:
        """Returns the captions for its prompt, nearest first; what is drawn depends on the example and the seed."""
        image = int.from_bytes(blake2b(self.image_id.encode(), digest_size=8).digest())
        return choose_retrieved(self.candidates, k, mode, np.random.default_rng([*seed, image, self.number]))


@dataclass(frozen=True)
class ExampleStream:
    """The examples of several parts.

    Attributes:
        features: The folder of stored features.
        candidates: The folder of candidates; None without retrieval.
        parts: The parts of one split.
        batch_size: Examples of one step, over all workers.
        parts_together: Number of parts that are held and shuffled together.
        seed: Seed of the order.
    """

    features: str
    candidates: str | None
    parts: tuple[PartEntry, ...]
    batch_size: int
    parts_together: int
    seed: int

    @property
    def examples(self) -> int:
        """The number of examples."""
        return sum(part.examples for part in self.parts)

    @property
    def batches_per_epoch(self) -> int:
        """The number of batches; the last one may be smaller."""
        return -(-self.examples // self.batch_size)

    def batches(self, epoch: int, first: int = 0, rank: int = 0, world_size: int = 1) -> Iterator[list[Example]]:
        """Yields one worker's share of each batch of an epoch; it may be empty in the last one.

        Args:
            epoch: The epoch, counted from 0.
            first: The batch to start with; whole windows before it are not read.
            rank: The worker's rank.
            world_size: The number of workers.
        """
        examples = self._shuffled(epoch, first * self.batch_size)
        for _ in range(first, self.batches_per_epoch):
            yield list(islice(examples, self.batch_size))[rank::world_size]

    def _shuffled(self, epoch: int, skipped: int) -> Iterator[Example]:
        """Yields all examples of an epoch except the first `skipped`."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.parts)).tolist()
        windows = [order[start : start + self.parts_together] for start in range(0, len(order), self.parts_together)]
        for number, window in enumerate(windows):
            count = sum(self.parts[place].examples for place in window)
            if skipped >= count:
                skipped -= count
                continue
            examples = [example for place in window for example in read_examples(self, self.parts[place])]
            shuffled = np.random.default_rng([self.seed, epoch, number]).permutation(len(examples))
            for place in shuffled[skipped:].tolist():
                yield examples[place]
            skipped = 0
            del examples  # before the next window is read


def read_examples(stream: ExampleStream, part: PartEntry) -> list[Example]:
    """Reads all examples of a part, in their stored order; an image's examples share its features."""
    rows = read_features(storage.join(stream.features, part.split, part.name))
    candidates: list[list[str]] = [[] for _ in rows.image_ids]
    if stream.candidates is not None:
        candidates = read_candidates(storage.join(stream.candidates, part.split, part.name))
    return [
        Example(image_id, caption, number, candidates[row], rows.features[row])
        for row, image_id in enumerate(rows.image_ids)
        for number, caption in enumerate(rows.captions[row])
    ]
