"""Checkpoints of a training run: the trained weights, the optimiser, and the run's progress; on any storage.

    OUT/checkpoints/step-000001200/trained.safetensors    the cross-attention, named as in the decoder
    OUT/checkpoints/step-000001200/state.pt               optimiser and scaler
    OUT/checkpoints/step-000001200/checkpoint.json        written last: a folder without it does not exist

No state of random numbers is stored: they are functions of the seed, the step and the worker. torch is imported only to
read and write weights.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal

from smallcap import storage
from smallcap.errors import CheckpointError
from smallcap.records import Record, VersionedRecord, load_record

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "checkpoints"
MARKER, WEIGHTS_FILE, STATE_FILE = "checkpoint.json", "trained.safetensors", "state.pt"


class EpochResult(Record):
    """The losses and the score of an epoch."""

    epoch: int  # counted from 1
    step: int  # steps done at its end
    loss: float  # nats per token, mean over the epoch's tokens, with dropout
    validation_loss: float | None = None  # nats per token, without dropout
    cider: float | None = None  # 1.0 is what papers print as 100


class TrainCheckpoint(VersionedRecord):
    """The content of `checkpoint.json`."""

    format_version: Literal[1] = 1
    step: int  # steps done
    epochs: tuple[EpochResult, ...]  # the finished ones
    epoch_loss: float = 0.0  # nats, summed over the tokens of the epoch that has begun
    epoch_tokens: int = 0
    frozen_sha256: str  # of the decoder's other weights in the process that trained
    sha256: dict[str, str]  # of each file, by name

    @property
    def folder(self) -> str:
        """The name of the checkpoint's folder."""
        return folder_name(self.step)


def folder_name(step: int) -> str:
    """Returns the name of the folder for the checkpoint after `step` steps."""
    return f"step-{step:09d}"


def save_train_checkpoint(
    out: str, checkpoint: TrainCheckpoint, weights: Mapping[str, Tensor], state: Mapping[str, Any]
) -> TrainCheckpoint:
    """Writes a checkpoint, its marker last; returns it with its files' checksums."""
    import torch
    from safetensors.torch import save

    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    files = {WEIGHTS_FILE: save(tensors), STATE_FILE: buffer.getvalue()}
    for name, data in files.items():
        storage.write_bytes(storage.join(out, FOLDER, checkpoint.folder, name), data)
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    checkpoint = checkpoint.model_copy(update={"sha256": sums})
    checkpoint.write(storage.join(out, FOLDER, checkpoint.folder, MARKER))
    return checkpoint


def find_train_checkpoint(out: str) -> TrainCheckpoint | None:
    """Returns the newest finished checkpoint; None where there is none.

    Raises:
        CheckpointError: Its marker is malformed.
    """
    for folder in reversed(storage.list_folder(storage.join(out, FOLDER))):
        checkpoint = load_record(TrainCheckpoint, storage.join(folder, MARKER), CheckpointError)
        if checkpoint is not None:
            return checkpoint
    return None


def load_trained_weights(out: str, step: int, sha256: str | None = None) -> dict[str, Tensor]:
    """Reads the trained weights of the checkpoint after `step` steps.

    Raises:
        CheckpointError: The file's checksum is not `sha256`.
    """
    from safetensors.torch import load

    return load(_read(storage.join(out, FOLDER, folder_name(step), WEIGHTS_FILE), sha256))


def restore_trained_weights(weights: Mapping[str, Tensor], out: str, step: int, sha256: str | None = None) -> None:
    """Copies the trained weights of the checkpoint after `step` steps into `weights`, by name.

    Raises:
        CheckpointError: The file's checksum is not `sha256`.
    """
    import torch

    trained = load_trained_weights(out, step, sha256)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(trained[name])


def load_train_state(out: str, checkpoint: TrainCheckpoint) -> dict[str, Any]:
    """Reads the state of optimiser and scaler.

    Raises:
        CheckpointError: The file does not match its marker.
    """
    import torch

    uri = storage.join(out, FOLDER, checkpoint.folder, STATE_FILE)
    data = _read(uri, checkpoint.sha256[STATE_FILE])
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError("A checkpoint's state cannot be read.", where=uri, found=str(error)) from error
    return state


def remove_train_checkpoints(out: str, kept: Collection[int]) -> None:
    """Deletes all checkpoints except those after `kept` steps, their markers first."""
    names = {folder_name(step) for step in kept}
    for folder in storage.list_folder(storage.join(out, FOLDER)):
        if folder.rsplit("/", 1)[-1] not in names:
            storage.remove(storage.join(folder, MARKER))
            storage.remove(folder)


def _read(uri: str, sha256: str | None) -> bytes:
    data = storage.read_bytes(uri)
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256:
        raise CheckpointError(
            "A checkpoint's file does not match its marker.",
            where=uri,
            expected=sha256,
            found=found,
            remedy="Delete the checkpoint's folder; the run continues from the previous one.",
        )
    return data
