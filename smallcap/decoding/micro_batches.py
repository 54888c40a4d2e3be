"""Batches that go on in smaller parts when a GPU's memory has run out.

What fits is estimated before the first batch (`smallcap.batch_size`), but another process may take memory afterwards. A
batch that runs out is run again in halves, and later batches are cut alike. No image's caption depends on its batch.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable
from typing import TypeVar

import torch

from smallcap.errors import RunError

_OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")  # of what torch's own allocator did not allocate

Part = TypeVar("Part")

_log = logging.getLogger(__name__)


class MicroBatches:
    """Runs one step of captioning on whole batches, or on parts that fit once memory has run out.

    An instance lives as long as the model, because it remembers what fits. Several threads may use it if `free` allows
    that.

        decoding = MicroBatches("the decoder", model.free_memory, relief="Use fewer beams")
        parts = decoding.run(len(prompts), lambda rows: model.generate(hidden_states[rows], prompts[rows]))

    Args:
        step: What is run, as messages name it.
        free: Gives memory back that is only kept for speed, such as recorded graphs. It is called by `run`, in its
            thread, when nothing of the failed attempt is referenced any more.
        relief: What the user can do so that this step takes less memory; the beginning of a sentence.
        limit: Most rows that are run together at first; None for whole batches.

    Attributes:
        limit: Most rows that are run together.
        halvings: How often memory ran out, so that the limit became smaller.
    """

    def __init__(self, step: str, free: Callable[[], None], relief: str, limit: int | None = None) -> None:
        self._step, self._free, self._relief, self.limit = step, free, relief, limit
        self.halvings = 0

    def run(self, size: int, run_rows: Callable[[slice], Part]) -> list[Part]:
        """Runs all rows of a batch.

        Args:
            size: Number of rows.
            run_rows: Maps a slice of the rows to a result, which is not None. It is repeated for rows whose run has
                failed, so it changes nothing.

        Returns:
            One result for each part, in the order of the rows; none for a batch without rows.

        Raises:
            RunError: The memory does not suffice for one row.
        """
        parts: list[Part] = []
        start, last_try = 0, False
        while start < size:
            count = min(self.limit or size, size - start)
            done = self._attempt(slice(start, start + count), run_rows, last_try)
            if done is None:
                self._free()
            else:
                parts.append(done)
                start += count
            last_try = done is None and count == 1  # with all memory freed
        return parts

    def _attempt(self, rows: slice, run_rows: Callable[[slice], Part], last_try: bool) -> Part | None:
        """Returns the result of some rows, or None where memory ran out; the limit is then lower.

        The error's traceback keeps the failed attempt's tensors alive, so it must be gone before memory is freed.
        """
        count = rows.stop - rows.start
        try:
            return run_rows(rows)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if last_try:
                raise RunError(
                    "The GPU's memory does not suffice for one image.",
                    where=f"{self._step}, on {platform.node()}",
                    found=str(error).partition("\n")[0],
                    remedy=f"{self._relief}, or end what else runs on the GPU.",
                ) from error
        if count > 1:
            self.halvings += 1
            self.limit = 1 << (count - 1).bit_length() - 1  # the power of two below, to which batches are padded
            _log.warning(
                "The GPU's memory ran out with %d images in %s; captioning goes on with %d.",
                count,
                self._step,
                self.limit,
            )
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Says whether an error, or one that it arose from, is a GPU's lack of memory."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, torch.OutOfMemoryError):
            return True
        if isinstance(cause, RuntimeError) and any(words in str(cause) for words in _OUT_OF_MEMORY):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
