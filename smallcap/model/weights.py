"""Reads a model's tensors from its file, and lets the model be built for them; nothing in the file is executed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from smallcap.errors import CheckpointError
from smallcap.model.remote import shown_place

_FILLING = frozenset(["kaiming_uniform_", "normal_", "ones_", "uniform_", "zeros_"])


class Unfilled(TorchFunctionMode):
    """Leaves the weights of modules that are built in the block as they are: those of a file will replace them.

    Drawing random ones takes longer than reading real ones. torch's `meta` device draws none, but imports its compiler.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls a function of torch, unless it would fill a tensor."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _FILLING:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors or `.bin` file by name; their bytes are read when they are used.

    Raises:
        CheckpointError: The file is damaged, or unpickling it would execute code.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return dict(tensors)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "The weights file holds more than tensors and is not unpickled.",
            where=shown_place(path),
            remedy="If you trust it, convert it to safetensors.",
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError("The weights file is damaged.", where=shown_place(path), found=str(error)) from error
