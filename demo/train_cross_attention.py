"""Trains the demo's cross-attention by SmallCap's own objective; CLIP and GPT-2 stay as they are.

Only scenes of the training domains are used, each encoded once. The prompt holds the four captions of the training
domains' dump that CLIP finds nearest to the image, those of the image itself left out. The loss is on the caption that
follows the prompt. Steps with a prompt without captions may come first; a cross-attention that was trained by them
names what it knows whatever the prompt says.

Source: Ramos et al. 2023, section 3.3; other choices of the retrieved captions: Li et al. 2024, section 5.
"""

import argparse
import itertools
import math
import random
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from demo.cross_attention_data import Batch, Examples, load_training_scenes
from demo.cross_attention_start import Whitening, start_at_nouns
from demo.data import fast_matrices, render_pool
from demo.world import TRAINING, load_kinds, scenes_of
from smallcap.model.assembly import join_frozen_parts
from smallcap.model.checkpoint import SmallCapModel, save_checkpoint
from smallcap.model.clip_encoder import load_retrieval_encoder
from smallcap.model.files import DEMO
from smallcap.model.prompt import encode_texts, load_tokenizer
from smallcap.training.objective import caption_loss, collate, freeze_all_but_cross_attention
from smallcap.training.retrieval_sampling import RetrievalMode

WHITENED_FROM, STARTED_FROM = 2_500, 4_000  # scenes


@dataclass(frozen=True)
class CrossAttentionRecipe:
    """What decides the result of the training."""

    scenes: int = 24_000
    captions_per_scene: int = 4
    reduce_factor: int = 1
    k: int = 4
    retrieval: RetrievalMode = "top-k"
    plain_steps: int = 0  # first, without retrieval
    plain_batch_size: int = 128
    steps: int = 1_200  # then with retrieved captions
    batch_size: int = 48
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.05
    start_scale: float = 1.0  # of the values' first map, against the nouns' embeddings
    seed: int = 0


def train(recipe: CrossAttentionRecipe, model: SmallCapModel, features: Tensor, batches: Iterable[Batch]) -> None:
    """Trains the cross-attention in place; prints the state every 100 steps."""
    trained = freeze_all_but_cross_attention(model.decoder)
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.98))
    total = recipe.plain_steps + recipe.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / recipe.warmup_steps) * (0.51 + 0.49 * math.cos(math.pi * step / total)),
    )
    model.decoder.train()
    running, start = 0.0, time.perf_counter()
    for step, (rows, examples) in enumerate(batches, start=1):
        with fast_matrices():
            loss = caption_loss(model.decoder, features[rows].float(), *collate(examples, model.config.pad_token_id))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        running += loss.item()
        if step % 100 == 0:
            seconds = time.perf_counter() - start
            print(f"cross-attention step {step}: loss {running / 100:.3f}, {seconds:.0f} s", flush=True)
            running = 0.0
    model.decoder.eval()


def train_cross_attention(
    recipe: CrossAttentionRecipe, clip_folder: Path, language_model_folder: Path, images: np.ndarray, out: Path
) -> None:
    """Trains the cross-attention between a CLIP and a GPT-2, and writes the checkpoint with its tokenizer.

    Args:
        recipe: What decides the result.
        clip_folder: The CLIP, of transformers; vision encoder and retrieval encoder in one.
        language_model_folder: The GPT-2, of transformers, with its tokenizer.
        images: uint8 [at least recipe.scenes, IMAGE_PX, IMAGE_PX, 3], the rendered training scenes.
        out: Folder for the checkpoint.
    """
    torch.manual_seed(recipe.seed)
    model = join_frozen_parts(
        str(clip_folder),
        str(language_model_folder),
        recipe.reduce_factor,
        retrieval_encoder=DEMO,
        k=recipe.k,
        seed=recipe.seed,
    )
    tokenizer = load_tokenizer(str(language_model_folder))
    scenes = load_training_scenes(
        model,
        load_retrieval_encoder(f"hf:{clip_folder}"),
        tokenizer,
        images[: recipe.scenes],
        recipe.captions_per_scene,
        recipe.retrieval,
    )
    whitening = Whitening.of(scenes.features[:WHITENED_FROM])
    features = whitening.apply(scenes.features)
    nouns = [ids[0] for ids in encode_texts(tokenizer, [f" {kind.noun}" for kind in load_kinds()])]
    started = features[:STARTED_FROM]
    start_at_nouns(model, started, scenes_of(TRAINING, len(started)), nouns, recipe.start_scale)
    examples = Examples(model, tokenizer, scenes, random.Random(recipe.seed))
    batches = itertools.chain(
        examples.plain(recipe.plain_steps, recipe.plain_batch_size), examples.prompted(recipe.steps, recipe.batch_size)
    )
    train(recipe, model, features, batches)
    whitening.fold_into(model)
    # The same function under the name that GPT-2 checkpoints, and so the reference, know it by.
    model.config = replace(model.config, decoder=replace(model.config.decoder, activation="gelu_new"))
    save_checkpoint(model, out, torch.float16)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(language_model_folder / name, out / name)


def main() -> None:
    """Trains the demo's cross-attention."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("out/demo-model"))
    parser.add_argument("--out", type=Path, help="by default smallcap/ in the work folder")
    parser.add_argument("--plain-steps", type=int, default=CrossAttentionRecipe.plain_steps)
    parser.add_argument("--steps", type=int, default=CrossAttentionRecipe.steps)
    parser.add_argument("--reduce-factor", type=int, default=CrossAttentionRecipe.reduce_factor)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = CrossAttentionRecipe(
        plain_steps=arguments.plain_steps, steps=arguments.steps, reduce_factor=arguments.reduce_factor
    )
    work = arguments.work_dir
    images = render_pool(TRAINING, recipe.scenes, work)
    train_cross_attention(recipe, work / "clip", work / "language-model", images, arguments.out or work / "smallcap")


if __name__ == "__main__":
    main()
