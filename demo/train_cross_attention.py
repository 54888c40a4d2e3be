"""Trains the demo's cross-attention by SmallCap's own objective; CLIP and GPT-2 stay as they are.

Each training scene is encoded once. Training starts with the short prompt without retrieval, which a checkpoint also
serves (k=0), and goes on with the prompt that holds the four captions of the shipped dump that CLIP finds nearest to
the image, those of the image itself left out. The loss is on the caption that follows the prompt.

Two things are meant to speed it up; what each is worth has not been measured apart. The patches are whitened, because
their spread differs by a factor of a thousand between directions; the whitening is folded into the weights at the end.
And the last layer's values start at the linear map from patches to the nouns' embeddings that fits best. Both change
where training starts and how it goes, not what is trained.

Source: Ramos et al. 2023, section 3.3.
"""

import argparse
import math
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import faiss
import numpy as np
import torch
from torch import Tensor
from transformers import CLIPModel, GPT2LMHeadModel

from demo.data import normalise, object_table, region_masks, render_pool, train_scenes
from demo.datastore import CAPTIONS_PER_SCENE, datastore_rows
from demo.world import TRAIN_SEEDS, captions_of, load_kinds, sample_scene
from smallcap.checkpoint import SmallCapConfig, SmallCapModel, save_checkpoint
from smallcap.clip_encoder import RetrievalEncoder, load_retrieval_encoder
from smallcap.gpt2 import parse_gpt2_config
from smallcap.prompt import build_prompts, build_training_example, encode_texts, load_tokenizer
from smallcap.training import caption_loss, collate, freeze_all_but_cross_attention

ENCODE_BATCH = 250


@dataclass(frozen=True)
class CrossAttentionRecipe:
    """What decides the result of the training."""

    scenes: int = 24_000
    captions_per_scene: int = 4
    reduce_factor: int = 1
    k: int = 4
    plain_steps: int = 2_000  # first, without retrieval: what is in the image is learnt at a sixth of the cost
    plain_batch_size: int = 128
    steps: int = 1_000  # then with retrieved captions
    batch_size: int = 48
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    start_scale: float = 4.0  # of the values' first map, against the nouns' embeddings
    seed: int = 0


@dataclass(frozen=True)
class EncodedTexts:
    """Token ids: the prompt without retrieval, each scene's prompt with it, and each scene's captions."""

    plain_prompt: list[int]
    prompts: list[list[int]]
    captions: list[list[list[int]]]


def join_frozen_parts(clip_folder: Path, language_model_folder: Path, reduce_factor: int) -> SmallCapModel:
    """Returns a SmallCap model of the trained CLIP and GPT-2, its cross-attention untrained."""
    clip = CLIPModel.from_pretrained(clip_folder, dtype=torch.float32)
    language_model = GPT2LMHeadModel.from_pretrained(language_model_folder)
    vision = clip.config.vision_config
    decoder = language_model.config.to_dict() | {
        "encoder_hidden_size": vision.hidden_size,
        "cross_attention_reduce_factor": reduce_factor,
    }
    config = SmallCapConfig(
        encoder={
            "projection_dim": clip.config.projection_dim,
            "vision_config": {"model_type": "clip_vision_model"}
            | {
                name: getattr(vision, name)
                for name in (
                    "hidden_size",
                    "intermediate_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "image_size",
                    "patch_size",
                    "hidden_act",
                )
            },
        },
        decoder=parse_gpt2_config(decoder),
        eos_token_id=language_model.config.eos_token_id,
        pad_token_id=language_model.config.pad_token_id,
        retrieval_encoder="demo",
    )
    model = SmallCapModel(config)
    model.encoder.transformer.load_state_dict(clip.vision_model.state_dict())
    loaded = model.decoder.load_state_dict(language_model.state_dict(), strict=False)
    assert loaded.unexpected_keys == ["lm_head.weight"], loaded.unexpected_keys
    assert all("cross" in name for name in loaded.missing_keys), loaded.missing_keys
    return model


@torch.inference_mode()
def encode_scenes(
    model: SmallCapModel, retrieval_encoder: RetrievalEncoder, images: np.ndarray
) -> tuple[Tensor, np.ndarray]:
    """Returns cross-attention's features [N, P, Hv] (fp16, to fit in memory) and the embeddings [N, D] for search."""
    assert retrieval_encoder.share_weights_with(model.encoder), "the two roles of CLIP have different weights"
    features, embeddings = [], []
    for start in range(0, len(images), ENCODE_BATCH):
        hidden, class_token = model.encoder(normalise(np.array(images[start : start + ENCODE_BATCH])))
        features.append(hidden.half())
        embeddings.append(retrieval_encoder.project(class_token).numpy())
    return torch.cat(features), np.concatenate(embeddings)


def retrieve_others(retrieval_encoder: RetrievalEncoder, embeddings: np.ndarray, k: int) -> list[list[str]]:
    """Returns for each training scene the k nearest captions of the dump that are not its own, nearest first."""
    rows = datastore_rows()
    captions_xb = retrieval_encoder.encode_texts([caption for _, caption in rows])
    index = faiss.IndexFlatIP(captions_xb.shape[1])
    index.add(captions_xb)
    _, neighbours = index.search(embeddings, k + CAPTIONS_PER_SCENE)
    retrieved = []
    for seed, found in zip(TRAIN_SEEDS, neighbours, strict=False):
        name = f"train-{seed:06d}.jpg"
        retrieved.append([rows[i][1] for i in found if rows[i][0] != name][:k])
    return retrieved


@dataclass(frozen=True)
class Whitening:
    """A linear map that gives the patches zero mean and unit spread in every direction.

    Attributes:
        mean: [Hv].
        matrix: [Hv, Hv], symmetric.
    """

    mean: Tensor
    matrix: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Whitening":
        """Measures the map on [N, P, Hv] features."""
        rows = features.float().flatten(0, 1)
        spread, axes = torch.linalg.eigh(torch.cov(rows.T))
        return cls(rows.mean(0), (axes * (spread + 1e-3 * spread.mean()).rsqrt()) @ axes.T)

    def apply(self, features: Tensor, rows_at_once: int = 1_000) -> Tensor:
        """Returns [N, P, Hv] whitened features in bf16."""
        parts = features.split(rows_at_once)
        return torch.cat([((part.float() - self.mean) @ self.matrix).bfloat16() for part in parts])

    @torch.no_grad()
    def fold_into(self, model: SmallCapModel) -> None:
        """Makes a cross-attention that was trained on whitened features take the encoder's own."""
        for block in model.decoder.transformer.h:  # type: ignore[union-attr]
            projection = block.crossattention.c_attn
            projection.bias -= self.mean @ self.matrix @ projection.weight
            projection.weight.copy_(self.matrix @ projection.weight)


@torch.no_grad()
def start_at_nouns(model: SmallCapModel, features: Tensor, noun_ids: Sequence[int], scale: float) -> None:
    """Sets the last cross-attention's values to the ridge regression from patches to their nouns' embeddings.

    Args:
        model: Its reduce factor must be 1.
        features: [N, 1 + grid * grid, Hv] whitened features of the first N training scenes.
        noun_ids: The token of each kind's noun, in the table's order.
        scale: Of the regression's targets.
    """
    kinds, places = object_table(train_scenes(len(features)))
    patches = features[:, 1:].float()
    inside = (region_masks(places, round(patches.shape[1] ** 0.5)) > 0) & (kinds >= 0)[..., None]  # [N, 3, patches]
    kind_of = torch.where(inside, kinds.clamp(min=0)[..., None], -1).amax(1)  # [N, patches]
    nouns = model.decoder.transformer.wte.weight[list(noun_ids)]  # type: ignore[union-attr]
    nouns = nouns - nouns.mean(0)
    on_objects, on_ground = patches[kind_of >= 0], patches[kind_of < 0]
    on_ground = on_ground[torch.randperm(len(on_ground))[: len(on_objects) // 2]]
    sources = torch.cat([on_objects, on_ground])
    targets = scale * torch.cat([nouns[kind_of[kind_of >= 0]], torch.zeros(len(on_ground), nouns.shape[1])])
    centred = sources - sources.mean(0)
    covariance = centred.T @ centred / len(centred)
    ridge = 1e-3 * covariance.diagonal().mean() * torch.eye(len(covariance))
    weight = torch.linalg.solve(covariance + ridge, centred.T @ (targets - targets.mean(0)) / len(centred))
    attention = model.decoder.transformer.h[-1].crossattention  # type: ignore[union-attr]
    size = weight.shape[1]
    attention.c_attn.weight[:, size:] = weight
    attention.c_attn.bias[size:] = targets.mean(0) - sources.mean(0) @ weight
    attention.c_proj.weight.copy_(torch.eye(size))


def sample_batches(recipe: CrossAttentionRecipe, lengths: Sequence[int], rng: random.Random) -> Iterator[list[int]]:
    """Yields one batch of rows per step with retrieval.

    Prompts of like length lie together, which saves a quarter of the padding.
    """
    group: list[list[int]] = []
    for _ in range(recipe.steps):
        if not group:
            rows = [rng.randrange(len(lengths)) for _ in range(16 * recipe.batch_size)]
            rows.sort(key=lambda row: lengths[row])
            group = [rows[i : i + recipe.batch_size] for i in range(0, len(rows), recipe.batch_size)]
            rng.shuffle(group)
        yield group.pop()


def sample_examples(
    recipe: CrossAttentionRecipe, model: SmallCapModel, texts: EncodedTexts
) -> Iterator[tuple[list[int], list[tuple[list[int], list[int]]]]]:
    """Yields each step's rows and, for each row, its input ids and labels."""
    rng = random.Random(recipe.seed)
    eos, pad = model.config.eos_token_id, model.config.pad_token_id
    for _ in range(recipe.plain_steps):
        rows = [rng.randrange(len(texts.prompts)) for _ in range(recipe.plain_batch_size)]
        yield (
            rows,
            [build_training_example(texts.plain_prompt, rng.choice(texts.captions[row]), eos, pad) for row in rows],
        )
    for rows in sample_batches(recipe, [len(ids) for ids in texts.prompts], rng):
        yield (
            rows,
            [build_training_example(texts.prompts[row], rng.choice(texts.captions[row]), eos, pad) for row in rows],
        )


def train(recipe: CrossAttentionRecipe, model: SmallCapModel, features: Tensor, texts: EncodedTexts) -> None:
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
    for step, (rows, examples) in enumerate(sample_examples(recipe, model, texts), start=1):
        with torch.autocast("cpu", torch.bfloat16):
            inputs = collate(examples, model.config.pad_token_id)
            loss = caption_loss(model.decoder, features[rows].float(), *inputs)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        running += loss.item()
        if step % 100 == 0:
            print(
                f"cross-attention step {step}: loss {running / 100:.3f}, {time.perf_counter() - start:.0f} s",
                flush=True,
            )
            running = 0.0
    model.decoder.eval()


def train_cross_attention(
    recipe: CrossAttentionRecipe, clip_folder: Path, language_model_folder: Path, images: np.ndarray, out: Path
) -> None:
    """Trains the cross-attention between a CLIP and a GPT-2 and write the checkpoint with its tokenizer."""
    torch.manual_seed(recipe.seed)
    model = join_frozen_parts(clip_folder, language_model_folder, recipe.reduce_factor).eval()
    retrieval_encoder = load_retrieval_encoder(f"hf:{clip_folder}")
    features, embeddings = encode_scenes(model, retrieval_encoder, images[: recipe.scenes])
    retrieved = retrieve_others(retrieval_encoder, embeddings, recipe.k)
    tokenizer = load_tokenizer(str(language_model_folder))
    texts = EncodedTexts(
        plain_prompt=build_prompts(tokenizer, model.config.template, [[]])[0],
        prompts=build_prompts(tokenizer, model.config.template, retrieved),
        captions=[
            encode_texts(tokenizer, captions_of(sample_scene(seed), recipe.captions_per_scene))
            for seed in TRAIN_SEEDS[: recipe.scenes]
        ],
    )
    whitening = Whitening.of(features[:2_500])
    features = whitening.apply(features)
    nouns = [ids[0] for ids in encode_texts(tokenizer, [f" {kind.noun}" for kind in load_kinds()])]
    start_at_nouns(model, features[:4_000], nouns, recipe.start_scale)
    train(recipe, model, features, texts)
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
    parser.add_argument("--steps", type=int, default=CrossAttentionRecipe.steps)
    parser.add_argument("--reduce-factor", type=int, default=CrossAttentionRecipe.reduce_factor)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = CrossAttentionRecipe(steps=arguments.steps, reduce_factor=arguments.reduce_factor)
    work = arguments.work_dir
    images = render_pool(TRAIN_SEEDS[: recipe.scenes], work / f"scenes-{recipe.scenes}.npy")
    train_cross_attention(recipe, work / "clip", work / "language-model", images, work / "smallcap")


if __name__ == "__main__":
    main()
