"""Trains the demo's cross-attention with SmallCap's objective; CLIP and GPT-2 stay as they are.

Only scenes of the training domains are used, and each is encoded once. The prompt holds the four captions of the
training domains' dump that CLIP finds nearest to the image, without the image's own. The loss is on the caption that
follows the prompt. Steps without retrieved captions may come first; a cross-attention that was trained with such steps
names what it knows, whatever the prompt says.

Source: Ramos et al. 2023, section 3.3; other choices of the retrieved captions: Li et al. 2024, section 5.
"""

import itertools
import random
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from demo.cross_attention_data import Batch, Examples, load_training_scenes
from demo.cross_attention_start import Whitening, start_at_nouns
from demo.training import Recipe, descend, fast_matrices
from demo.world import TRAINING, load_kinds, scenes_of
from smallcap.model.assembly import join_frozen_models
from smallcap.model.checkpoint import SmallCapModel, save_checkpoint
from smallcap.model.clip_encoder import load_retrieval_encoder
from smallcap.model.files import DEMO
from smallcap.model.prompt import encode_texts, load_tokenizer
from smallcap.training.objective import caption_loss, collate, freeze_all_but_cross_attention
from smallcap.training.retrieval_sampling import RetrievalMode

WHITENED_FROM, STARTED_FROM = 2_500, 4_000  # scenes


@dataclass(frozen=True)
class CrossAttentionRecipe(Recipe):
    """The settings of cross-attention's training."""

    reduce_factor: int = 1
    k: int = 4
    retrieval: RetrievalMode = "top-k"
    plain_steps: int = 0  # first, without retrieval
    plain_batch_size: int = 128
    steps: int = 1_200  # then with retrieved captions
    batch_size: int = 48
    warmup_steps: int = 50
    start_scale: float = 1.0  # size of the values' first targets relative to the noun embeddings


def train(recipe: CrossAttentionRecipe, model: SmallCapModel, features: Tensor, batches: Iterable[Batch]) -> None:
    """Trains the cross-attention in place, on features [N, P, Hv]."""
    trained = freeze_all_but_cross_attention(model.decoder)

    def losses() -> Iterator[tuple[Tensor, dict[str, float]]]:
        for rows, examples in batches:
            inputs = collate(examples, model.config.pad_token_id)
            with fast_matrices():
                loss = caption_loss(model.decoder, features[rows].float(), *inputs)
            yield loss, {}

    model.decoder.train()
    steps = recipe.plain_steps + recipe.steps
    descend("cross-attention", trained, recipe, losses(), lowest=0.02, steps=steps, vectors_decay=True)
    model.decoder.eval()


def train_cross_attention(
    recipe: CrossAttentionRecipe, clip_folder: Path, language_model_folder: Path, images: np.ndarray, out: Path
) -> None:
    """Trains the cross-attention between a CLIP and a GPT-2, and writes the checkpoint with its tokenizer.

    Args:
        recipe: The settings that decide the result.
        clip_folder: Folder of transformers' CLIP, which is vision encoder and retrieval encoder in one.
        language_model_folder: Folder of transformers' GPT-2, with its tokenizer.
        images: uint8 [at least recipe.scenes, IMAGE_PX, IMAGE_PX, 3], the rendered training scenes.
        out: The folder for the checkpoint.
    """
    torch.manual_seed(recipe.seed)
    model = join_frozen_models(
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
    # The same function, under the name that it has in GPT-2 checkpoints and so in the reference.
    model.config = replace(model.config, decoder=replace(model.config.decoder, activation="gelu_new"))
    save_checkpoint(model, out, torch.float16)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(language_model_folder / name, out / name)
