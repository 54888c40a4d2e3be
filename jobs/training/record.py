"""The record of a training run, `train.json`: what is pinned for all its attempts, and their results.

Only the checkpoints say how far the run is (`smallcap.training.checkpoints`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from jobs.cluster.pinned import PinnedRecord, check_same_options
from smallcap import storage
from smallcap.errors import SchemaError
from smallcap.records import Record, load_record
from smallcap.training.checkpoints import EpochResult
from smallcap.training.config import TrainConfig

RECORD_FILE = "train.json"
SelectedBy = Literal["cider", "validation_loss", "last"]
# Options that may differ between the attempts of one run: where it runs, how it fetches, and where things are kept.
_FREE = (
    *("out", "features", "workers", "compute", "checkpoint_steps", "images", "retrieval.cache_dir"),
    *("require_index_id", "require_model_hash"),
    *(f"data.{name}" for name in ("fetch_timeout_s", "fetch_attempts", "allow_private_hosts")),
)


class TrainAttempt(Record):
    """One start of the job."""

    started_at: str
    finished_at: str | None = None
    device: str
    workers: int
    first_step: int  # the first step of the attempt, from 0
    seconds: float | None = None  # wall time of the training loop, with starting workers and validation


class TrainData(Record):
    """What a run trains on."""

    images: int
    examples: int
    validation_images: int
    errors: dict[str, int]  # images without features, by code
    malformed: int  # rows in lists that could not be read
    leaks: int | None = None  # images with a candidate that has the text of one of their own captions


class TrainRecord(PinnedRecord):
    """The content of `train.json`."""

    format_version: Literal[1] = 1
    start_id: str
    start_sha256: str | None = None  # of the weights file of the checkpoint that is trained further
    model_sha256: str | None = None  # of the weights file of the model that was written
    dtype: str | None = None  # of the forward pass
    data: TrainData | None = None
    trained_parameters: int | None = None
    steps: int | None = None
    frozen_sha256: str | None = None  # of all weights except the cross-attention, before training
    frozen_sha256_after: str | None = None  # of the model that was written
    epochs: tuple[EpochResult, ...] = ()
    selected_by: SelectedBy | None = None
    best_epoch: int | None = None
    attempts: tuple[TrainAttempt, ...] = ()

    def check_same_run(self, config: TrainConfig, start_id: Callable[[], str]) -> None:
        """Checks that a command continues this run; `start_id` fingerprints what it starts from.

        Raises:
            ConfigError: The config or the start differs.
        """
        check_same_options(self, config, _FREE, (self.start_id, start_id), config.out)


def load_train_record(out: str) -> TrainRecord | None:
    """Loads a run's record; returns None where no run has begun.

    Raises:
        SchemaError: `train.json` is malformed, or of an unknown format version.
    """
    return load_record(TrainRecord, storage.join(out, RECORD_FILE), SchemaError)


def write_train_record(out: str, record: TrainRecord) -> None:
    """Writes `train.json` atomically."""
    record.write(storage.join(out, RECORD_FILE))


def choose_best(epochs: tuple[EpochResult, ...]) -> tuple[EpochResult, SelectedBy]:
    """Returns the best epoch and what chose it: CIDEr, then validation loss; without validation, the last epoch."""
    if any(epoch.validation_loss is None for epoch in epochs):
        return epochs[-1], "last"
    by_loss = sorted(epochs, key=lambda epoch: epoch.validation_loss or 0.0)
    if any(epoch.cider is None for epoch in epochs):
        return by_loss[0], "validation_loss"
    return max(by_loss, key=lambda epoch: epoch.cider or 0.0), "cider"
