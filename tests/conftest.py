"""What tests of several rooms share: a tiny CLIP, one Ray, and an S3 server in a process of its own.

S3 starts before Ray: Ray's workers are other processes and take the endpoint from the environment they inherit.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smallcap import storage
from smallcap.caption_store import CAPTION_STORE_COLUMNS, write_caption_file
from smallcap.index_manifest import (
    EncoderIdentity,
    FileEntry,
    IndexManifest,
    RemovedEntry,
    ShardEntry,
    SourceEntry,
    manifest_uri,
    write_pointer,
)
from smallcap.model_files import tokenizer_folder

# Before anything of Ray is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")

TINY_DIM = 16


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIPModel folder of transformers: seeded random weights, a byte-level tokenizer, dim 16."""
    return make_tiny_clip(tmp_path_factory.mktemp("tiny-clip"), seed=0)


@pytest.fixture(scope="session")
def other_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `tiny_clip`, with other weights."""
    return make_tiny_clip(tmp_path_factory.mktemp("other-clip"), seed=1)


def make_tiny_clip(folder: Path, seed: int) -> Path:
    """Writes a tiny CLIPModel and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    vocabulary = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"<|startoftext|>": 256, "<|endoftext|>": 257}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", 256), ("<|endoftext|>", 257)]
    )
    ends = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=77, **ends).save_pretrained(folder)
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**layers, "vocab_size": 258, "max_position_embeddings": 77, "bos_token_id": 256, "eos_token_id": 257}
    vision = {**layers, "image_size": 32, "patch_size": 16}
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=TINY_DIM))
    for parameter in model.parameters():  # the usual initialisation is so small that all texts look alike
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_smallcap(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    """A SmallCap checkpoint whose vision tower is `tiny_clip`'s, with a random GPT-2 and GPT-2's own tokenizer."""
    import torch
    from transformers import CLIPModel

    from smallcap.checkpoint import SmallCapConfig, SmallCapModel, save_checkpoint
    from smallcap.text_decoder import DecoderConfig

    folder = tmp_path_factory.mktemp("tiny-smallcap")
    clip = CLIPModel.from_pretrained(tiny_clip)
    decoder = DecoderConfig(
        model_type="this_gpt2",
        vocab_size=50257,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        ffn_size=64,
        max_positions=512,
        encoder_hidden_size=32,
        cross_attention_reduce_factor=2,
        layer_norm_eps=1e-5,
        activation="gelu_new",
        dropout=0.1,
    )
    config = SmallCapConfig({"vision_config": clip.config.vision_config.to_dict()}, decoder, 13, 0, max_new_tokens=8)
    torch.manual_seed(0)
    model = SmallCapModel(config)
    for parameter in model.decoder.parameters():  # GPT-2's initialisation would say the same of every image
        torch.nn.init.normal_(parameter, std=0.3)
    model.encoder.transformer.load_state_dict(clip.vision_model.state_dict())
    save_checkpoint(model, folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tokenizer_folder("gpt2") / name, folder)
    return folder


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of an S3 server of this test session; `AWS_ENDPOINT_URL` and dummy credentials are exported."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{port}"
    given = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in given}
    try:
        _wait_for(endpoint, server)
        os.environ.update(given)
        yield endpoint
    finally:
        server.terminate()
        server.wait()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def _wait_for(endpoint: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(endpoint, timeout=1):
                return
        except OSError:
            assert server.poll() is None, "the S3 server has ended"
            time.sleep(0.1)
    raise TimeoutError("the S3 server does not answer")


@pytest.fixture
def s3(s3_server: str, request: pytest.FixtureRequest) -> str:
    """A bucket of this test's own, as `s3://NAME`."""
    import s3fs

    name = "test-" + "".join(letter if letter.isalnum() else "-" for letter in request.node.name.lower())[:50]
    fs = s3fs.S3FileSystem()
    if not fs.exists(name):
        fs.mkdir(name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def ray_session(s3_server: str) -> Iterator[None]:
    """One local Ray with four logical CPUs for the whole test session."""
    import ray

    from jobs.ray_session import connect

    connect()
    yield
    ray.shutdown()


PublishIndex = Callable[..., IndexManifest]


@pytest.fixture
def publish_index(tmp_path: Path) -> PublishIndex:
    """A function that publishes an index of given vectors, texts and image ids without the builder.

    Call it as `publish_index(index_uri, vectors, texts, image_ids=None, shards=1)`, also with `index_key`, `nprobe`,
    `k_factor`, `removed` ids and the `encoder`'s identity.
    """

    def publish(
        index_uri: str,
        vectors: np.ndarray,
        texts: Sequence[str],
        image_ids: Sequence[list[str] | None] | None = None,
        shards: int = 1,
        **settings: Any,
    ) -> IndexManifest:
        staged = tmp_path / f"staged-{uuid.uuid4().hex}"
        manifest = write_version(staged, vectors, texts, image_ids or [None] * len(texts), shards, **settings)
        for entry in manifest.files:
            storage.upload(staged / entry.file, storage.join(index_uri, entry.file))
        storage.write_bytes(manifest_uri(index_uri, manifest.index_id), manifest.to_json().encode())
        write_pointer(index_uri, manifest.index_id)
        return manifest

    return publish


def write_version(
    folder: Path,
    vectors: np.ndarray,
    texts: Sequence[str],
    image_ids: Sequence[list[str] | None],
    shards: int,
    index_key: str = "Flat",
    nprobe: int | None = None,
    k_factor: int = 1,
    removed: Sequence[int] = (),
    encoder: EncoderIdentity | None = None,
) -> IndexManifest:
    """Writes the files of a version to a local folder, and returns its manifest."""
    import faiss
    import pyarrow as pa

    from smallcap.faiss_index import inverted_file_of, is_lossy

    rows, dim = vectors.shape
    folder.mkdir(parents=True)
    trained = faiss.deserialize_index(train_index(index_key, dim, vectors.tobytes()))
    inverted_file = inverted_file_of(trained)

    def write_shard(first: int, stop: int) -> Path:
        index = faiss.clone_index(trained)
        if inverted_file is None:
            index.add(vectors[first:stop])
        else:
            index.add_with_ids(vectors[first:stop], np.arange(first, stop))
        faiss.write_index(index, str(folder / f"{first}.faiss"))
        return folder / f"{first}.faiss"

    def write_captions(first: int, stop: int) -> Path:
        columns = [range(first, stop), texts[first:stop], [["dump.csv"]] * (stop - first), image_ids[first:stop]]
        fields = zip(columns, CAPTION_STORE_COLUMNS, strict=True)
        arrays = [pa.array(list(column), field.type) for column, field in fields]
        write_caption_file(folder / f"{first}.arrow", pa.record_batch(arrays, schema=CAPTION_STORE_COLUMNS))
        return folder / f"{first}.arrow"

    def write_vectors(first: int, stop: int) -> Path:
        np.save(folder / f"{first}.npy", vectors[first:stop].astype(np.float16))
        return folder / f"{first}.npy"

    template = FileEntry.adopt(write_shard(0, 0), folder, "template")
    writers = {"shard": write_shard, "captions": write_captions}
    if is_lossy(index_key):
        writers["vectors"] = write_vectors
    entries: dict[str, list[ShardEntry]] = {kind: [] for kind in ("shard", "captions", "vectors")}
    bounds = [rows * number // shards for number in range(shards + 1)]
    for first, stop in pairwise(bounds):
        for kind, write in writers.items():
            entry = ShardEntry.adopt(write(first, stop), folder, kind, first_id=first, rows=stop - first)
            entries[kind].append(entry)
    tombstones = None
    if removed:
        np.save(folder / "removed.npy", np.array(sorted(removed), np.int64))
        tombstones = RemovedEntry.adopt(folder / "removed.npy", folder, "removed", rows=len(removed))
    per_image = Counter(image for images in image_ids for image in images or [])
    return IndexManifest(
        encoder=encoder or EncoderIdentity(spec="hf:test", weights_sha256="0" * 64, dim=dim),
        dim=dim,
        index_key=index_key,
        nlist=None if inverted_file is None else inverted_file.nlist,
        nprobe=nprobe,
        k_factor=k_factor,
        template=template,
        shards=tuple(entries["shard"]),
        captions=tuple(entries["captions"]),
        vectors=tuple(entries["vectors"]),
        removed=tombstones,
        max_captions_per_image=max(per_image.values(), default=0),
        sources=(SourceEntry(uri="dump.csv", name="dump.csv", rows=len(texts), sha256="0" * 64),),
        filters={},
        dropped={},
        builder_version="0",
        created_at="2026-01-01T00:00:00+00:00",
    ).with_index_id()


@lru_cache
def train_index(index_key: str, dim: int, vectors: bytes) -> np.ndarray:
    """Returns a trained, empty index, serialized: many tests train the same one, and product quantizers take long."""
    import faiss

    index = faiss.index_factory(dim, index_key, faiss.METRIC_INNER_PRODUCT)
    index.train(np.frombuffer(vectors, np.float32).reshape(-1, dim))
    return faiss.serialize_index(index)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; the test is skipped where there is none."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data folder ../shared/data is absent")
    return folder
