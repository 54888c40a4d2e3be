"""Batches that go on in smaller parts when a GPU's memory has run out.

What fits is estimated before the first batch (`smallcap.batch_size`), but another process may take memory afterwards. A
batch that runs out is run again in halves, and later batches are cut alike. No image's caption depends on its batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from smallcap.errors import RunError

_OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")  # of what torch's own allocator did not allocate

Row = TypeVar("Row")

_log = logging.getLogger(__name__)


class MicroBatches:
    """Runs batches whole, or in parts that fit once memory has run out; for one thread at a time.

    An instance lives as long as the model, because it remembers what fits:

        micro_batches = MicroBatches(model.free_memory)
        captions = micro_batches.run(len(prompts), lambda rows: model.generate(hidden_states[rows], prompts[rows]))

    Args:
        free: Gives memory back that is only kept for speed, such as recorded graphs. It is called by `run`, in its
            thread, when nothing of the failed attempt is referenced any more.

    Attributes:
        limit: Most rows that are run together; None until memory has run out.
    """

    def __init__(self, free: Callable[[], None]) -> None:
        self._free = free
        self.limit: int | None = None

    def run(self, size: int, run_rows: Callable[[slice], Sequence[Row]]) -> list[Row]:
        """Runs all rows of a batch.

        Args:
            size: Number of rows.
            run_rows: Maps a slice of the rows to their results. It is repeated for rows whose run has failed, so it
                changes nothing.

        Returns:
            One result per row, in order.

        Raises:
            RunError: The memory does not suffice for one row.
        """
        results: list[Row] = []
        last_try = False
        while len(results) < size:
            start = len(results)
            count = min(self.limit or size, size - start)
            done = self._attempt(slice(start, start + count), run_rows, last_try)
            if done is None:
                self._free()
            else:
                results += done
            last_try = done is None and count == 1  # with all memory freed
        return results

    def _attempt(self, rows: slice, run_rows: Callable[[slice], Sequence[Row]], last_try: bool) -> Sequence[Row] | None:
        """Returns the results of some rows, or None where memory ran out; the limit is then lower.

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
                    found=str(error).partition("\n")[0],
                    remedy="Set search_device to cpu, use fewer beams or captions, let fewer actors share the GPU "
                    "(gpus_per_actor), or end what else runs on it.",
                ) from error
        if count > 1:
            self.limit = 1 << (count - 1).bit_length() - 1  # the power of two below, to which batches are padded
            _log.warning("The GPU's memory ran out with %d images; captioning goes on with %d.", count, self.limit)
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
