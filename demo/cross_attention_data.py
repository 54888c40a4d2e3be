"""Holds what the demo's cross-attention is trained on: encoded scenes, their captions, and retrieved captions."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import faiss
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from demo.data import normalise
from demo.datastore import CAPTIONS_PER_SCENE, datastore_rows, image_name
from demo.training import batches_of_like_length
from demo.world import TRAINING, captions_of, scenes_of
from smallcap.model.checkpoint import SmallCapModel
from smallcap.model.clip_encoder import RetrievalEncoder
from smallcap.model.prompt import build_prompts, build_training_example, encode_texts
from smallcap.training.retrieval_sampling import RetrievalMode, candidates_needed, choose_retrieved

ENCODE_BATCH = 250


@dataclass(frozen=True)
class TrainingScenes:
    """N training scenes as cross-attention sees them.

    Attributes:
        features: [N, P, Hv].
        captions: The token ids of each scene's captions.
        candidates: The captions of the datastore nearest to each scene, without its own, nearest first.
        mode: How a prompt's captions are chosen from the candidates.
    """

    features: Tensor
    captions: list[list[list[int]]]
    candidates: list[list[str]]
    mode: RetrievalMode


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


def retrieve_others(retrieval_encoder: RetrievalEncoder, embeddings: np.ndarray, count: int) -> list[list[str]]:
    """Returns the captions of the dump nearest to each training scene, without its own, nearest first."""
    rows = datastore_rows()
    captions_xb = retrieval_encoder.encode_texts([caption for _, caption in rows])
    index = faiss.IndexFlatIP(captions_xb.shape[1])
    index.add(captions_xb)
    _, neighbours = index.search(embeddings, count + CAPTIONS_PER_SCENE)
    retrieved = []
    for seed, nearest in zip(TRAINING.seeds, neighbours, strict=False):
        image = image_name(TRAINING, seed)
        retrieved.append([rows[row][1] for row in nearest if rows[row][0] != image][:count])
    return retrieved


def load_training_scenes(
    model: SmallCapModel,
    retrieval_encoder: RetrievalEncoder,
    tokenizer: PreTrainedTokenizerBase,
    images: np.ndarray,
    captions_per_scene: int,
    mode: RetrievalMode,
) -> TrainingScenes:
    """Encodes the first scenes of the training set, one for each image, and retrieves captions for them."""
    features, embeddings = encode_scenes(model, retrieval_encoder, images)
    return TrainingScenes(
        features=features,
        captions=[
            encode_texts(tokenizer, captions_of(scene, captions_per_scene))
            for scene in scenes_of(TRAINING, len(images))
        ],
        candidates=retrieve_others(retrieval_encoder, embeddings, candidates_needed(mode, model.config.k)),
        mode=mode,
    )


Batch = tuple[list[int], list[tuple[list[int], list[int]]]]  # rows and, for each, its input ids and labels


@dataclass(frozen=True)
class Examples:
    """Draws training examples for a model: a scene's prompt and one of its captions."""

    model: SmallCapModel
    tokenizer: PreTrainedTokenizerBase
    scenes: TrainingScenes
    rng: random.Random

    def plain(self, steps: int, batch_size: int) -> Iterator[Batch]:
        """Yields examples whose prompt holds no captions."""
        prompt = build_prompts(self.tokenizer, self.model.config.template, [[]])[0]
        for _ in range(steps):
            yield self._batch([(row, prompt) for row in self._draw_rows(batch_size)])

    def prompted(self, steps: int, batch_size: int) -> Iterator[Batch]:
        """Yields examples whose prompt holds k retrieved captions, in a batch of like length."""
        drawn = np.random.default_rng(self.rng.randrange(2**32))
        config, scenes = self.model.config, self.scenes

        def draw(count: int) -> list[tuple[int, list[int]]]:
            rows = self._draw_rows(count)
            chosen = [choose_retrieved(scenes.candidates[row], config.k, scenes.mode, drawn) for row in rows]
            return list(zip(rows, build_prompts(self.tokenizer, config.template, chosen), strict=True))

        for prompted in batches_of_like_length(draw, lambda pair: len(pair[1]), steps, batch_size, self.rng):
            yield self._batch(prompted)

    def _draw_rows(self, count: int) -> list[int]:
        return [self.rng.randrange(len(self.scenes.captions)) for _ in range(count)]

    def _batch(self, prompted: list[tuple[int, list[int]]]) -> Batch:
        eos, pad = self.model.config.eos_token_id, self.model.config.pad_token_id
        captions = self.scenes.captions
        return [row for row, _ in prompted], [
            build_training_example(prompt, self.rng.choice(captions[row]), eos, pad) for row, prompt in prompted
        ]
