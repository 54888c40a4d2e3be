"""Which of a machine's GPUs a thread works on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def on_device(device: torch.device) -> AbstractContextManager[None]:
    """Makes a GPU this thread's current one until the block ends; does nothing for a CPU.

    An operation runs where its tensors are. But new streams, recordings and pinned memory belong to the current GPU,
    which is the first one unless somebody says otherwise.
    """
    names_one = device.type == "cuda" and device.index is not None  # `cuda` alone is the current one
    return torch.cuda.device(device) if names_one else nullcontext()
