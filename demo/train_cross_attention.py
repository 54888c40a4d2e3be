"""Trains the demo's cross-attention by the job that users train with, `smallcap train`; CLIP and GPT-2 stay frozen.

Only scenes of the training domains are used. The prompt holds captions of the training domains' datastore that CLIP
finds near the image, without the image's own. Whatever is not a constant here has the job's default.

Source: Ramos et al. 2023, section 3.3; other choices of the retrieved captions: Li et al. 2024, section 5.
"""

import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from demo.datastore import image_name
from demo.render import encode_jpeg
from demo.world import TRAINING, captions_of, scenes_of
from jobs import train
from smallcap.model.checkpoint import load_checkpoint, save_checkpoint
from smallcap.model.files import DEMO
from smallcap.training.config import OptimizerConfig, TrainConfig, TrainRetrievalConfig
from smallcap.training.retrieval_sampling import RetrievalMode

SCENES = 24_000
CAPTIONS_PER_SCENE = 4
SCENES_PER_FILE = 1_000
SCENES_PER_ROW_GROUP = 250
BATCH_SIZE = 64
SHORT_SCENES = 4_000  # for trainings that are compared with each other: one epoch is 250 steps


def write_training_scenes(folder: Path, count: int = SCENES, workers: int = 2) -> None:
    """Writes the first training scenes as Parquet files with the images' bytes and their captions."""
    chunks = [range(start, min(start + SCENES_PER_FILE, count)) for start in range(0, count, SCENES_PER_FILE)]
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(partial(_write_file, folder=folder), chunks))


def _write_file(numbers: Sequence[int], folder: Path) -> None:
    scenes = scenes_of(TRAINING, len(numbers), numbers[0])
    table = pa.table(
        {
            "image_id": [image_name(TRAINING, scene.seed) for scene in scenes],
            "image": [encode_jpeg(scene) for scene in scenes],
            "caption": [captions_of(scene, CAPTIONS_PER_SCENE) for scene in scenes],
        }
    )
    pq.write_table(table, folder / f"{numbers[0]:06d}.parquet", row_group_size=SCENES_PER_ROW_GROUP)


def training_config(
    work: Path,
    out: Path,
    index: str,
    reduce_factor: int = 1,
    retrieval: RetrievalMode | None = "top-k",
    scenes: int = SCENES,
    epochs: int = 2,
) -> TrainConfig:
    """Returns the options of a training.

    Args:
        work: The work folder, which has the training scenes and the language model.
        out: The run's folder.
        index: Index of the training domains' captions.
        reduce_factor: Factor by which the cross-attention's heads are smaller than GPT-2's.
        retrieval: How the prompt's captions are chosen; None trains without retrieval.
        scenes: Number of scenes.
        epochs: Passes over all captions of these scenes.
    """
    return TrainConfig(
        sources=(str(work / "training-scenes"),),
        index=index,
        out=str(out),
        vision_encoder=DEMO,
        decoder=str(work / "language-model"),
        reduce_factor=reduce_factor,
        features=str(work / f"features-{scenes}") if retrieval else None,  # without it, there are no embeddings
        limit=scenes,
        checkpoint_steps=250,
        retrieval=TrainRetrievalConfig(mode=retrieval, k=4) if retrieval else TrainRetrievalConfig(k=0),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50, epochs=epochs, batch_size=BATCH_SIZE),
    )


def train_cross_attention(config: TrainConfig, model_folder: Path) -> None:
    """Trains, from where an earlier attempt stopped, and writes the model in float16 with its tokenizer."""
    train.run(config)
    trained = Path(config.out) / "model"
    save_checkpoint(load_checkpoint(str(trained)), model_folder, torch.float16)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(trained / name, model_folder / name)
