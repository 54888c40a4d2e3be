"""Random content for a captioner of the published sizes: weights, captions, an index, a photograph.

Random weights do not end captions, so a beam search ends them at given lengths.
"""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import faiss
import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from smallcap.decoding.beam_search import BeamSearch
from smallcap.decoding.strategy import GenerationOptions
from smallcap.decoding.text_decoder import DecoderConfig
from smallcap.index.caption_store import CAPTION_STORE_COLUMNS, write_caption_file
from smallcap.index.manifest import EncoderIdentity, FileEntry, IndexManifest, ShardEntry, SourceEntry
from smallcap.index.retriever import Retriever
from smallcap.model.checkpoint import SmallCapConfig, SmallCapModel
from smallcap.model.clip import Clip
from smallcap.model.clip_config import TextConfig, VisionConfig
from smallcap.model.clip_encoder import HFRetrievalEncoder, OpenCLIPRetrievalEncoder, RetrievalEncoder
from smallcap.model.encoder_spec import open_clip_config, open_clip_preprocessing

VIT_B_32 = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
GPT2_124M = DecoderConfig(
    model_type="this_gpt2",
    vocab_size=50257,
    hidden_size=768,
    num_layers=12,
    num_heads=12,
    ffn_size=3072,
    max_positions=1024,
    encoder_hidden_size=768,
    cross_attention_reduce_factor=4,
    layer_norm_eps=1e-5,
    activation="gelu_new",
    dropout=0.0,
)
PHOTO_PX = (640, 256)  # the longer side of photographs: as in COCO, and as in data sets that were made smaller
_WORDS = 20_000  # in the vocabulary of the random captions
_CAPTION_WORDS = (10, 18)  # shortest and longest; with k=4 a prompt has about 66 tokens, as with real captions
_MEAN_LENGTH, _LENGTH_SPREAD = 11.0, 2.0  # tokens of a caption, eos included
EOS_TOKEN_ID, PAD_TOKEN_ID = 13, 0


def build_model(reduce_factor: int, device: str, dtype: str) -> SmallCapModel:
    """Returns CLIP ViT-B/32 and GPT-2 124M joined by untrained cross-attention, the same at every call."""
    torch.manual_seed(0)
    decoder = replace(GPT2_124M, cross_attention_reduce_factor=reduce_factor)
    model = SmallCapModel(SmallCapConfig({"vision_config": VIT_B_32}, decoder, EOS_TOKEN_ID, PAD_TOKEN_ID))
    return model.to(device=torch.device(device), dtype=getattr(torch, dtype)).eval().requires_grad_(False)


def build_clip(model: SmallCapModel) -> Clip:
    """Returns a CLIP whose vision tower has the model's weights, so that one pass serves both encoders."""
    clip = Clip(VisionConfig.parse(VIT_B_32), TextConfig(vocab_size=GPT2_124M.vocab_size), dim=512)
    clip.vision_model.load_state_dict(model.encoder.transformer.state_dict())
    return clip.eval()


def build_retrieval_encoder(name: str, model: SmallCapModel) -> RetrievalEncoder:
    """Returns a random retrieval encoder: `shared` has the vision encoder's weights, other names are open_clip's.

    Raises:
        ConfigError: open_clip has no such architecture.
    """
    if name == "shared":
        identity = EncoderIdentity(spec="hf:random", weights_sha256="0" * 64, dim=512)
        return HFRetrievalEncoder(build_clip(model).to(model.device, model.dtype), build_tokenizer(), identity)
    import open_clip

    config = open_clip_config(name)
    identity = EncoderIdentity(spec=f"open_clip:{name}/random", weights_sha256="0" * 64, dim=config["embed_dim"])
    clip, tokenizer = open_clip.create_model(name).to(model.device, model.dtype), open_clip.get_tokenizer(name)
    return OpenCLIPRetrievalEncoder(clip, tokenizer, identity, open_clip_preprocessing(name), model.device)


class PlannedLengths(BeamSearch):
    """A beam search whose captions end at planned lengths, whatever the logits say."""

    per_image: tuple[str, ...] = (*BeamSearch.per_image, "lengths")
    planned: tuple[int, ...] = ()
    prefilled_at: ClassVar[float] = 0.0  # when the last batch's prompts were done, by `time.perf_counter`

    def __init__(self, options: GenerationOptions, keys: Tensor) -> None:
        super().__init__(options, keys)
        planned = torch.tensor(self.planned, device=keys.device)
        self.lengths = planned[keys % len(planned)]

    def advance(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Makes eos impossible before an image's last step, and certain at it."""
        last = (self.lengths <= self.step + 1)[:, None]
        logits[..., self.options.eos_token_id] = torch.where(last, 1e4, -torch.inf)
        is_first = self.step == 0  # it ends prefill; the others may be recorded, where nothing can wait
        chosen = super().advance(logits)
        if is_first:
            if logits.is_cuda:
                torch.cuda.synchronize(logits.device)
            PlannedLengths.prefilled_at = time.perf_counter()
        return chosen


def realistic_lengths(count: int) -> tuple[int, ...]:
    """Returns caption lengths in tokens, eos included, spread as those of COCO's captions are."""
    drawn = np.random.default_rng(0).normal(_MEAN_LENGTH, _LENGTH_SPREAD, count)
    return tuple(int(length) for length in drawn.round().clip(6, 20))


def random_captions(count: int) -> list[str]:
    """Returns captions of words that are one token each."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(_CAPTION_WORDS[0], _CAPTION_WORDS[1] + 1, count)
    words = np.char.add("w", rng.integers(0, _WORDS, lengths.sum()).astype(str))
    return [" ".join(caption_words) for caption_words in np.split(words, lengths.cumsum()[:-1])]


def build_tokenizer() -> Tokenizer:
    """Returns a tokenizer with GPT-2's vocabulary size, whose tokens are words and punctuation."""
    words = ["!", "Similar", "images", "show", "This", "image", "shows", "w", "x", "y", "z", "?", ",", "."]
    words += [f"w{i}" for i in range(_WORDS)]
    words += [f"unused{i}" for i in range(GPT2_124M.vocab_size - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def write_random_index(folder: Path, rows: int, identity: EncoderIdentity) -> Retriever:
    """Writes an index version with one Flat shard of random vectors and captions, and opens it."""
    return Retriever(write_index(folder, random_vectors(rows, identity.dim), random_captions(rows), identity), folder)


def random_vectors(rows: int, dim: int) -> np.ndarray:
    """Returns random unit vectors [rows, dim] float32."""
    vectors = np.random.default_rng(0).standard_normal((rows, dim), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def write_index(
    folder: Path,
    vectors: np.ndarray,
    texts: Sequence[str],
    identity: EncoderIdentity,
    images: Sequence[str] | None = None,
) -> IndexManifest:
    """Writes an index version with one Flat shard.

    Args:
        folder: An empty folder.
        vectors: [N, dim] float32 unit vectors.
        texts: The captions.
        identity: The encoder that is said to have made the vectors.
        images: The image of each caption; by default captions have none.
    """
    rows, dim = vectors.shape
    index = faiss.IndexFlatIP(dim)
    faiss.write_index(index, str(folder / "template.faiss"))
    index.add(vectors)
    faiss.write_index(index, str(folder / "shard.faiss"))
    image_ids = [None] * rows if images is None else [[image] for image in images]
    columns = [np.arange(rows), texts, [["random"]] * rows, image_ids]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, CAPTION_STORE_COLUMNS, strict=True)]
    write_caption_file(folder / "captions.arrow", pa.record_batch(arrays, schema=CAPTION_STORE_COLUMNS))
    return IndexManifest(
        encoder=identity,
        dim=dim,
        index_key="Flat",
        template=FileEntry.adopt(folder / "template.faiss", folder, "template"),
        shards=(ShardEntry.adopt(folder / "shard.faiss", folder, "shard", first_id=0, rows=rows),),
        captions=(ShardEntry.adopt(folder / "captions.arrow", folder, "captions", first_id=0, rows=rows),),
        max_captions_per_image=max(Counter(images).values()) if images else 0,
        sources=(SourceEntry(uri="random", name="random", rows=rows, sha256="0" * 64),),
        filters={},
        dropped={},
        builder_version="benchmark",
        created_at="",
    ).with_index_id()


def make_photo(longer_px: int = PHOTO_PX[0]) -> bytes:
    """Returns a JPEG file with a photograph's detail: smooth noise at several scales, 4 to 3."""
    size_px = (longer_px, longer_px * 3 // 4)
    rng = np.random.default_rng(0)
    layers = [
        np.asarray(
            Image.fromarray(rng.integers(0, 256, (size * 3 // 4, size, 3), dtype=np.uint8)).resize(size_px), float
        )
        for size in (8, 32, 128)
    ]
    buffer = io.BytesIO()
    Image.fromarray(np.average(layers, axis=0, weights=[4, 2, 1]).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
