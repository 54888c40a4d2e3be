"""Writes the model of a finished run, `OUT/model`, in the reference's layout, and checks it."""

from __future__ import annotations

from jobs.training.start import ModelStart
from smallcap import storage
from smallcap.errors import CheckpointError
from smallcap.model.checkpoint import load_checkpoint, save_checkpoint
from smallcap.model.files import checkpoint_sha256
from smallcap.model.prompt import save_tokenizer
from smallcap.training.checkpoints import restore_trained_weights
from smallcap.training.objective import frozen_sha256

MODEL_FOLDER = "model"


def write_model(out: str, start: ModelStart, step: int, frozen: str) -> tuple[str, str]:
    """Joins the frozen weights of the start with the trained weights of a checkpoint; writes them with the tokenizer.

    Args:
        out: The run's folder.
        start: The model before training.
        step: The checkpoint's step.
        frozen: Fingerprint of all frozen weights before training.

    Returns:
        The fingerprint of the frozen weights that were written, read back from the files, and the sha256 of the
        weights file.

    Raises:
        CheckpointError: The frozen weights that were written differ from those of the start.
    """
    model = start.load()
    restore_trained_weights(model.decoder.cross_attention_parameters(), out, step)
    with storage.scratch_folder() as folder:
        save_checkpoint(model, folder)
        save_tokenizer(start.tokenizer_source, folder, start.config.retrieval.cache_dir)
        written = load_checkpoint(str(folder))
        after = frozen_sha256(written, written.decoder)
        if after != frozen:
            raise CheckpointError(
                "The written model has other frozen weights than the trained one.", expected=frozen, found=after
            )
        sha256 = checkpoint_sha256(str(folder))
        # config.json comes last: it makes the folder a checkpoint.
        for file in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
            storage.upload(file, storage.join(out, MODEL_FOLDER, file.name))
    return after, sha256
