"""A captioner that answers at once whatever a GPU computes, so that what is left is the work of the host's CPU.

Encoders, products of the search, and the decoder give answers that were made before. All else is what captions: crops
are copied for the upload, candidates are ranked and filtered, texts are looked up, prompts are built, captions become
text and text tokens again.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from torch import Tensor, nn

from smallcap.benchmark.random_content import EOS_TOKEN_ID, GPT2_124M, PAD_TOKEN_ID, random_vectors, write_index
from smallcap.captioned import ScoredCaptions
from smallcap.captioner import Captioner, Values
from smallcap.captioner_setup import CaptionerOptions
from smallcap.decoding.engine import Generated
from smallcap.images.crops import Pixels
from smallcap.images.decode import Preprocessing
from smallcap.index.gpu_search import ExactBlocks
from smallcap.index.manifest import EncoderIdentity, IndexManifest
from smallcap.index.partition import LocalPartition
from smallcap.index.ranking import NOTHING, Ranking
from smallcap.index.retriever import Neighbours, NeighbourSearch
from smallcap.model.checkpoint import SmallCapConfig, SmallCapModel
from smallcap.model.clip import pad_right
from smallcap.model.clip_encoder import RetrievalEncoder
from smallcap.model.clip_tokenizer import ClipTokenizer
from smallcap.model.files import demo_captions
from smallcap.model.prompt import encode_texts, load_tokenizer

IMAGE_PX = 224
_DIM = 512
_CAPTIONS_PER_IMAGE = 5  # as in COCO
_STRIDE = 7  # a query's neighbours are not captions of one image
_BETWEEN_QUERIES = 101
_RECUR_AFTER = 2_048  # queries
_CAPTION_WORDS = 10


@dataclass(frozen=True)
class HostResult:
    """The CPU time that an actor on a GPU takes for an image; `smallcap bench --host` prints it as JSON."""

    us_per_image: float
    parts: dict[str, float]  # us per image; they add up to `us_per_image`
    images_per_s: float  # the most that one thread could do besides the GPU
    options: dict[str, Any]
    machine: dict[str, Any]

    def to_json(self) -> str:
        """Returns one line of JSON."""
        return json.dumps(asdict(self))


class PartTimes:
    """Sums the process's CPU time by part: threads that help, as those of a tokenizer do, count as well."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the time of a block to a part."""
        started = time.process_time()
        yield
        self.seconds[name] += time.process_time() - started


class ReadyCaptioner(Captioner):
    """A captioner with GPT-2's and CLIP's tokenizers over an index of the demo's captions; see the module.

    Args:
        folder: An empty folder for the index.
        options: How to caption.
        captions: The number of captions in the index.
    """

    def __init__(self, folder: Path, options: CaptionerOptions, captions: int) -> None:
        texts = _demo_captions(captions)
        identity = EncoderIdentity(spec="hf:ready", weights_sha256="0" * 64, dim=_DIM)
        images = [image_id(number // _CAPTIONS_PER_IMAGE) for number in range(captions)]
        vectors = random_vectors(captions, _DIM).astype(np.float16).astype(np.float32)  # ranked again on the GPU
        manifest = write_index(folder, vectors, texts, identity, images)
        retriever = NeighbourSearch(manifest, _ReadyPartition(manifest, folder), np.empty(0, np.int64))
        super().__init__(_ready_model(), load_tokenizer("gpt2"), _ReadyEncoder(identity), retriever, options)
        self.times = PartTimes()
        ids = encode_texts(self.tokenizer, [" ".join(text.split()[:_CAPTION_WORDS]) for text in texts[:1000]])
        self._answers = [[Generated([*caption, EOS_TOKEN_ID], -7.5)] for caption in ids]
        self._queries = random_vectors(1000, _DIM)

    def encode(self, pixels: Sequence[Pixels]) -> tuple[Tensor, Tensor]:
        """Copies the crops as for an upload."""
        with self.times.part("copy crops"):
            self._stack([image.vision for image in pixels])
        return torch.empty(len(pixels), 0), torch.empty(len(pixels), 0)

    def embed(self, pixels: Sequence[Pixels], class_tokens: Tensor) -> np.ndarray:
        """Returns ready queries."""
        return self._queries[np.arange(len(pixels)) % len(self._queries)]

    def retrieve(self, embeddings: np.ndarray, exclude_image_ids: Values = None, indexes: Values = None) -> Neighbours:
        """Retrieves, with ready products."""
        with self.times.part("search"):
            return super().retrieve(embeddings, exclude_image_ids, indexes)

    def prompt(self, neighbours: Neighbours) -> list[list[int]]:
        """Builds the prompts."""
        with self.times.part("prompts"):
            return super().prompt(neighbours)

    def generate(
        self,
        hidden_states: Tensor,
        prompts: Sequence[Sequence[int]],
        pixels: Sequence[Pixels],
        num_captions: int | None = None,
    ) -> list[list[Generated]]:
        """Returns ready captions."""
        return [self._answers[number % len(self._answers)] for number in range(len(prompts))]

    def detokenise(self, generated: Sequence[Sequence[Generated]]) -> ScoredCaptions:
        """Turns the captions into text."""
        with self.times.part("detokenise"):
            return super().detokenise(generated)

    def clip_scores(self, embeddings: np.ndarray, captions: Sequence[str]) -> np.ndarray | None:
        """Tokenises the captions for their scores, with ready embeddings."""
        with self.times.part("tokenise for clip score"):
            return super().clip_scores(embeddings, captions)


def _ready_model() -> SmallCapModel:
    """Returns a model of hardly any size: only its config is used."""
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": IMAGE_PX, "patch_size": 32}
    sizes: dict[str, Any] = {"hidden_size": 8, "num_layers": 1, "num_heads": 1, "ffn_size": 8, "vocab_size": 20}
    sizes |= {"encoder_hidden_size": 8, "cross_attention_reduce_factor": 1}
    decoder = replace(GPT2_124M, **sizes)
    return SmallCapModel(SmallCapConfig({"vision_config": vision}, decoder, EOS_TOKEN_ID, PAD_TOKEN_ID)).eval()


def image_id(number: int) -> str:
    """Returns the id of an image; the index has captions of the first ones."""
    return f"train2017/{number:012d}.jpg"


def _demo_captions(count: int) -> list[str]:
    """Returns captions of the demo, again and again if it has fewer."""
    texts = list(islice(demo_captions(), count))
    return [texts[number % len(texts)] for number in range(count)]


class _ReadyBlocks(ExactBlocks):
    """An exact search on a GPU whose products are ready; neighbours recur after some thousand queries."""

    _queries = 0

    def _nearest(self, queries: np.ndarray, fetch: int) -> Ranking:
        numbers = (self._queries + np.arange(len(queries))[:, None]) % _RECUR_AFTER
        self._queries += len(queries)
        rows = (numbers * _BETWEEN_QUERIES + _STRIDE * np.arange(fetch)) % len(self._vectors)
        return np.tile(self._products(fetch), (len(queries), 1)), rows

    def _score_exactly(self, queries: np.ndarray, rows: np.ndarray) -> Ranking:
        scores = np.where(rows == NOTHING, -np.inf, self._products(rows.shape[1])).astype(np.float32)
        return scores, rows

    @staticmethod
    def _products(count: int) -> np.ndarray:
        return np.linspace(0.4, 0.1, count, dtype=np.float32)


class _ReadyPartition(LocalPartition):
    """A partition with such a search."""

    def __init__(self, manifest: IndexManifest, folder: Path) -> None:
        super().__init__(manifest, folder)
        self._gpu = _ReadyBlocks(self.shards, torch.device("cpu"), self.rank)


class _ReadyEncoder(RetrievalEncoder):
    """Tokenises texts as open_clip's CLIP does, and returns ready embeddings."""

    def __init__(self, identity: EncoderIdentity) -> None:
        super().__init__(identity, Preprocessing(IMAGE_PX), torch.device("cpu"))
        tokenizer = open_clip.get_tokenizer("ViT-B-32")
        self._tokenise, self._length = ClipTokenizer.of_open_clip(tokenizer), tokenizer.context_length
        self._features = torch.from_numpy(random_vectors(1000, _DIM))

    @property
    def vision_tower(self) -> nn.Module:
        """Nothing."""
        return nn.Identity()

    def _image_features(self, pixel_values: Tensor) -> Tensor:
        return self._features[: len(pixel_values)]

    def _text_features(self, texts: list[str]) -> Tensor:
        assert self._tokenise is not None
        ids = pad_right(self._tokenise(texts), self._length)
        return self._features[torch.arange(len(ids)) % len(self._features)]
