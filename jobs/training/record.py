"""A training run's own record, `train.json`: what is pinned for all of its attempts, and what came of them.

How far the run is stands in its checkpoints (`smallcap.training.checkpoints`), and nowhere else.
"""

from __future__ import annotations

import json
import uuid
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from jobs.cluster.pinned import check_same_options, installed_versions
from smallcap import storage
from smallcap.errors import SchemaError
from smallcap.training.checkpoints import EpochResult
from smallcap.training.config import TrainConfig

RECORD_FILE = "train.json"
SelectedBy = Literal["cider", "validation_loss", "last"]
# What may differ between the attempts of one run: where it runs, how it fetches, and where things are kept.
_FREE = (
    *("out", "features", "workers", "compute", "checkpoint_steps", "images", "retrieval.cache_dir"),
    *(f"data.{name}" for name in ("fetch_timeout_s", "fetch_attempts")),
)


class TrainAttempt(BaseModel):
    """One start of the job."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    started_at: str
    finished_at: str | None = None
    device: str
    workers: int
    first_step: int  # that it did
    seconds: float | None = None  # wall clock of the training loop, starts and validation included


class TrainData(BaseModel):
    """What a run trains on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int
    examples: int
    validation_images: int
    errors: dict[str, int]  # images without features, by code
    malformed: int  # rows of lists that could not be read
    leaks: int | None = None  # images with a candidate that has the text of one of their own captions


class TrainRecord(BaseModel):
    """The content of `train.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    run_id: str
    status: Literal["running", "complete"] = "running"
    config: dict[str, Any]
    start_id: str
    index_id: str | None
    retrieval_encoder: str | None
    versions: dict[str, str]
    dtype: str | None = None  # of the forward pass
    data: TrainData | None = None
    trained_parameters: int | None = None
    steps: int | None = None
    frozen_sha256: str | None = None  # of all weights but the cross-attention, before training
    frozen_sha256_after: str | None = None  # of the model that was written
    epochs: tuple[EpochResult, ...] = ()
    selected_by: SelectedBy | None = None
    best_epoch: int | None = None
    attempts: tuple[TrainAttempt, ...] = ()

    @classmethod
    def new(
        cls, config: TrainConfig, start_id: str, index_id: str | None, retrieval_encoder: str | None
    ) -> TrainRecord:
        """Returns the record of a run that begins."""
        return cls(
            run_id=uuid.uuid4().hex[:12],
            config=config.model_dump(mode="json"),
            start_id=start_id,
            index_id=index_id,
            retrieval_encoder=retrieval_encoder,
            versions=installed_versions(),
        )

    def check_same_run(self, config: TrainConfig, start_id: str) -> None:
        """Checks that a command continues this run.

        Raises:
            ConfigError: Its config or the model that it starts from differs.
        """
        check_same_options(self.config, config, _FREE, (self.start_id, start_id), config.out)

    def write(self, out: str) -> None:
        """Writes `train.json`, atomically."""
        data = json.dumps(self.model_dump(mode="json"), indent=2) + "\n"
        storage.write_bytes(storage.join(out, RECORD_FILE), data.encode())


def load_train_record(out: str) -> TrainRecord | None:
    """Loads a run's record; None where no run has begun.

    Raises:
        SchemaError: `train.json` is malformed, or of an unknown format version.
    """
    where = storage.join(out, RECORD_FILE)
    if not storage.exists(where):
        return None
    try:
        return TrainRecord.model_validate_json(storage.read_bytes(where))
    except ValidationError as error:
        raise SchemaError(
            "train.json is malformed, or of another format version.",
            where=where,
            expected="format_version 1",
            found=str(error),
            remedy="Use the smallcap release that wrote it, or a newer one.",
        ) from error


def choose_best(epochs: tuple[EpochResult, ...]) -> tuple[EpochResult, SelectedBy]:
    """Returns the best epoch and what it was chosen by: CIDEr, and of equals and without it, validation loss."""
    if any(epoch.validation_loss is None for epoch in epochs):
        return epochs[-1], "last"
    by_loss = sorted(epochs, key=lambda epoch: epoch.validation_loss or 0.0)
    if any(epoch.cider is None for epoch in epochs):
        return by_loss[0], "validation_loss"
    return max(by_loss, key=lambda epoch: epoch.cider or 0.0), "cider"
