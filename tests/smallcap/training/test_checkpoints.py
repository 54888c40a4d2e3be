from pathlib import Path

import pytest
import torch

from smallcap import storage
from smallcap.errors import CheckpointError
from smallcap.training.checkpoints import (
    FOLDER,
    MARKER,
    STATE_FILE,
    WEIGHTS_FILE,
    EpochResult,
    TrainCheckpoint,
    find_train_checkpoint,
    load_train_state,
    load_trained_weights,
    remove_train_checkpoints,
    save_train_checkpoint,
)


def save(anywhere: str, step: int) -> TrainCheckpoint:
    epochs = (EpochResult(epoch=1, step=4, loss=1.5, validation_loss=1.25, cider=0.5),)
    checkpoint = TrainCheckpoint(step=step, epochs=epochs, frozen_sha256="0" * 64, sha256={})
    state = {"optimizer": {"state": {0: {"step": torch.tensor(4.0)}}}, "scaler": {}}
    return save_train_checkpoint(anywhere, checkpoint, {"weight": torch.full((2, 3), float(step))}, state)


def test_the_newest_finished_one_is_found_and_read(anywhere: str) -> None:
    assert find_train_checkpoint(anywhere) is None
    save(anywhere, 9)
    newest = save(anywhere, 10)
    half = save(anywhere, 11)
    storage.remove(storage.join(anywhere, FOLDER, half.folder, MARKER))  # as if it had been interrupted
    found = find_train_checkpoint(anywhere)
    assert found == newest
    assert load_trained_weights(anywhere, 10, found.sha256[WEIGHTS_FILE])["weight"][0, 0] == 10
    assert load_train_state(anywhere, found)["optimizer"]["state"][0]["step"] == 4


def test_what_is_not_kept_is_removed(anywhere: str) -> None:
    for step in (1, 2, 3, 4):
        save(anywhere, step)
    remove_train_checkpoints(anywhere, {2, 4})
    left = {uri.rsplit("/", 1)[-1] for uri in storage.list_folder(storage.join(anywhere, FOLDER))}
    assert left == {"step-000000002", "step-000000004"}


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    checkpoint = save(str(tmp_path), 1)
    state = tmp_path / FOLDER / checkpoint.folder / STATE_FILE
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="does not match its marker"):
        load_train_state(str(tmp_path), checkpoint)
    (state.parent / MARKER).write_text("{}")
    with pytest.raises(CheckpointError, match=r"checkpoint\.json is malformed"):
        find_train_checkpoint(str(tmp_path))
