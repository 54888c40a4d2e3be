"""Few shapes on a GPU, where each new one costs plans, tuning or a recording; on a CPU every size is as good."""

from __future__ import annotations

import torch
from torch import Tensor

_TOKEN_MULTIPLE = 16  # tokens that sequences are padded to a multiple of
_ROW_MULTIPLE = 8  # values of half precision: 16 bytes, by which the fast kernels of matrix products read rows


def rows_on_gpu(count: int) -> int:
    """Returns the least power of two that is not below a number of images or texts; 0 for none."""
    return 1 << (count - 1).bit_length() if count else 0


def tokens_on_gpu(count: int) -> int:
    """Returns the least multiple of `_TOKEN_MULTIPLE` that is not below a number of tokens."""
    return _rounded_up(count, _TOKEN_MULTIPLE)


def row_on_gpu(values: int) -> int:
    """Returns the least multiple of `_ROW_MULTIPLE` that is not below the length of a matrix's row."""
    return _rounded_up(values, _ROW_MULTIPLE)


def _rounded_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def fill_up(batch: Tensor) -> Tensor:
    """Returns a batch with copies of its last row after it, as many as a GPU wants; on a CPU the batch itself."""
    missing = rows_on_gpu(len(batch)) - len(batch)
    if not batch.is_cuda or not missing:
        return batch
    return torch.cat([batch, batch[-1:].expand(missing, *batch.shape[1:])])
