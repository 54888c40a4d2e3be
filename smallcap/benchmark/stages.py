"""Measures the captioner at real sizes with random weights: each stage by itself, and the whole loop.

The parts are the ones that caption (`Captioner`, the engine, `Retriever` over an index on disk); only the weights, the
captions in the index and, where none are given, the photographs are random. Random weights do not end captions, so a
beam search is used whose captions end where a list of lengths says: realistic ones, and the full 25 tokens.

Operations are counted as the algorithm needs them, a multiplication and an addition as two: padded prompts, masked
slots and whatever a machine does beside matrix products count for nothing, so that the share of the measured matrix
rate is not flattered. Of CLIP's text encoder and of open_clip's models the count is torch's own.
"""

from __future__ import annotations

import io
import json
import math
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from smallcap.captioner import Captioner
from smallcap.config import GenerationConfig
from smallcap.decoding.beam_search import BeamSearch
from smallcap.decoding.engine import prefill
from smallcap.decoding.strategy import GenerationOptions
from smallcap.decoding.text_decoder import DecoderConfig
from smallcap.errors import ConfigError
from smallcap.images.crops import Pixels
from smallcap.images.decode import Preprocessing, crop_pixels, decode_image, decode_scaled
from smallcap.index.caption_store import CAPTION_STORE_COLUMNS, write_caption_file
from smallcap.index.manifest import EncoderIdentity, FileEntry, IndexManifest, ShardEntry, SourceEntry
from smallcap.index.retriever import Retriever
from smallcap.machine.precision import matrix_rate, resolve_dtype
from smallcap.machine.process_memory import keep_freed_memory
from smallcap.model.checkpoint import SmallCapConfig, SmallCapModel
from smallcap.model.clip_encoder import HFRetrievalEncoder, OpenCLIPRetrievalEncoder, RetrievalEncoder
from smallcap.model.prompt import build_prompts

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
_MATRIX_SHAPE = {"cpu": (1024, 768, 3072), "cuda": (8192, 8192, 8192)}
_PHOTO_PX = (640, 480)
_WORDS = 20_000  # of the synthetic captions
_CAPTION_WORDS = (10, 18)  # shortest and longest; with k=4 a prompt has about 66 tokens, as with real captions
_MEAN_LENGTH, _LENGTH_SPREAD = 11.0, 2.0  # tokens of a caption, eos included
EOS_TOKEN_ID, PAD_TOKEN_ID = 13, 0


@dataclass(frozen=True)
class BenchmarkOptions:
    """What to measure."""

    images: int = 64  # captioned by the whole loop
    batch_size: int = 64
    k: int = 4
    num_beams: int = 3
    reduce_factor: int = 4
    retrieval_encoder: str = "shared"  # or an architecture of open_clip, as RN50x64
    captions: int = 100_000  # in the index
    device: str = "cpu"
    dtype: str = "auto"
    repeats: int = 3
    compile: bool = False  # the encoders, by torch.compile
    photos: tuple[str, ...] = ()  # image files; by default one is made


@dataclass(frozen=True)
class StageResult:
    """One stage on its own."""

    stage: str
    images_per_s: float
    gflop_per_image: float | None = None  # None where a stage has no matrix products
    tflops: float | None = None  # achieved
    share: float | None = None  # of the measured matrix rate


@dataclass(frozen=True)
class BenchmarkResult:
    """All that was measured; the JSON of `smallcap bench` is made of it."""

    images_per_s: float  # of the whole loop at realistic caption lengths, without fetching and decoding images
    images_per_s_full_length: float  # the same with every caption of 25 tokens
    matrix_tflops: float  # measured
    mfu: float  # counted operations of the whole loop over its time, as a share of the matrix rate
    mfu_full_length: float
    gflop_per_image: float
    stages: tuple[StageResult, ...]
    mean_prompt_tokens: float
    mean_caption_tokens: float
    fast_decode_difference: float  # mean absolute difference of crops, decode: fast against exact, in 0 … 255
    options: dict[str, Any]
    machine: dict[str, Any]

    def to_json(self) -> str:
        """Returns one line of JSON."""
        return json.dumps(asdict(self))


class PlannedLengths(BeamSearch):
    """A beam search whose captions end after as many tokens as planned, whatever the logits say."""

    per_image: tuple[str, ...] = (*BeamSearch.per_image, "lengths")
    plan: tuple[int, ...] = ()

    def __init__(self, options: GenerationOptions, keys: Tensor) -> None:
        super().__init__(options, keys)
        plan = torch.tensor(self.plan, device=keys.device)
        self.lengths = plan[keys % len(plan)]

    def advance(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Makes eos impossible before an image's last step, and certain at it."""
        last = (self.lengths <= self.step + 1)[:, None]
        logits = logits.float()
        logits[..., self.options.eos_token_id] = torch.where(last, 1e4, -torch.inf)
        return super().advance(logits)


def run_benchmark(options: BenchmarkOptions) -> BenchmarkResult:
    """Measures every stage and the whole loop.

    Raises:
        ConfigError: The retrieval encoder is unknown.
    """
    keep_freed_memory()
    dtype = resolve_dtype(options.dtype, options.device)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        captioner = build_captioner(options, dtype, Path(folder))
        photos = [Path(photo).read_bytes() for photo in options.photos] or [make_photo()]
        benchmark = _Benchmark(options, captioner, photos)
        benchmark.run()
        return benchmark.result()


class _Benchmark:
    """One captioner being measured."""

    def __init__(self, options: BenchmarkOptions, captioner: Captioner, photos: list[bytes]) -> None:
        self.options, self.captioner = options, captioner
        self.photos = [photos[i % len(photos)] for i in range(options.batch_size)]
        self.rng = np.random.default_rng(0)
        self.stages: list[tuple[str, float, float]] = []  # name, images/s, FLOP per image
        self.matrix_rates = [self._matrix_rate()]
        self.lengths = realistic_lengths(options.batch_size)
        self.full = (captioner.generation.max_new_tokens,) * options.batch_size

    def run(self) -> None:
        """Measures the stages in the order in which an image goes through them, then the loop."""
        pixels = self._measure_images()
        hidden_states, queries, texts, of_encoding = self._measure_encoders(pixels)
        self.prompts = build_prompts(self.captioner.tokenizer, self.captioner.model.config.template, texts)
        of_text = self._measure_text(hidden_states, self.prompts, queries)  # FLOP per image at both lengths
        self.flops = [of_encoding + flops for flops in of_text]
        self.rates = [self._whole_loop(pixels, lengths) for lengths in (self.lengths, self.full)]
        self.matrix_rates.append(self._matrix_rate())

    def result(self) -> BenchmarkResult:
        """Returns what was measured, against the better of the matrix rates before and after."""
        matrix = max(self.matrix_rates)
        (rate, full_rate), (flops, full_flops) = self.rates, self.flops
        return BenchmarkResult(
            images_per_s=rate,
            images_per_s_full_length=full_rate,
            matrix_tflops=matrix / 1e12,
            mfu=rate * flops / matrix,
            mfu_full_length=full_rate * full_flops / matrix,
            gflop_per_image=flops / 1e9,
            stages=tuple(
                StageResult(name, speed, count / 1e9, speed * count / 1e12, speed * count / matrix)
                if count
                else StageResult(name, speed)
                for name, speed, count in self.stages
            ),
            mean_prompt_tokens=statistics.mean(map(len, self.prompts)),
            mean_caption_tokens=statistics.mean(self.lengths),
            fast_decode_difference=self._fast_decode_difference(),
            options=asdict(self.options) | {"photos": len(self.options.photos)},
            machine=describe_machine(self.captioner),
        )

    def _matrix_rate(self) -> float:
        model = self.captioner.model
        return matrix_rate(model.dtype, str(model.device), _MATRIX_SHAPE[model.device.type], seconds=1.0)

    def _measure_images(self) -> list[Pixels]:
        """Measures decoding and cropping; returns crops that all differ."""
        plan, photos = self.captioner.crop_plan, self.photos
        wanted = [preprocessing for preprocessing in (plan.vision, plan.retrieval) if preprocessing]
        least_px = max(preprocessing.size_px for preprocessing in wanted)
        images = [decode_image(photo) for photo in photos]
        self._measure("decode image", lambda: [decode_image(photo) for photo in photos])
        self._measure("decode image, fast", lambda: [decode_scaled(photo, least_px) for photo in photos])
        self._measure("preprocess", lambda: [crop_pixels(image, one) for one in wanted for image in images])
        return [self._vary(plan.crop(photo)) for photo in photos]

    def _measure_encoders(self, pixels: list[Pixels]) -> tuple[Tensor, np.ndarray | None, list[list[str]], float]:
        """Measures both encoders and the search; returns their results and the operations of all three."""
        captioner = self.captioner
        assert captioner.retriever is not None
        hidden_states, class_token = captioner._encode(pixels)
        queries = captioner._embed(pixels, class_token)
        flops = [
            vision_flops(captioner.model),
            retrieval_flops(captioner),
            2.0 * captioner.retriever.manifest.ntotal * captioner.retriever.dim,
        ]
        self._measure("vision encoder", lambda: captioner._encode(pixels), flops[0])
        self._measure("retrieval encoder", lambda: captioner._embed(pixels, class_token), flops[1])
        self._measure("search", lambda: captioner._retrieve(queries, None, len(pixels)), flops[2])
        neighbours = captioner._retrieve(queries, None, len(pixels))
        texts = [[neighbour.text for neighbour in of_image] for of_image in neighbours]
        return hidden_states, queries, texts, sum(flops)

    def _measure_text(
        self, hidden_states: Tensor, prompts: list[list[int]], queries: np.ndarray | None
    ) -> tuple[float, float]:
        """Measures all from the prompt on; returns the operations at realistic and at full length."""
        captioner, model = self.captioner, self.captioner.model
        texts = [captioner.tokenizer.decode(prompt) for prompt in prompts]
        self._measure("tokenise", lambda: captioner.tokenizer(texts))
        of_prefill = statistics.mean(prefill_flops(model, len(prompt)) for prompt in prompts)
        self._measure(
            "prefill", lambda: prefill(model.decoder, hidden_states, prompts, captioner.generation), of_prefill
        )
        prefill_s = self.options.batch_size / self.stages[-1][1]
        totals = []
        for name, score, lengths in (
            ("decode tokens", "clip score", self.lengths),
            ("decode 25 tokens", "clip score, 25 tokens", self.full),
        ):
            of_tokens = statistics.mean(
                decode_flops(model, len(prompt), length, self.options.num_beams)
                for prompt, length in zip(prompts, lengths, strict=True)
            )
            with self._planned(lengths):
                seconds = self._seconds(lambda: model.generate(hidden_states, prompts, captioner.generation))
                generated = [best for (best,) in model.generate(hidden_states, prompts, captioner.generation)]
            assert [len(one.token_ids) for one in generated] == list(lengths), "the planned lengths were not kept"
            self._add(name, max(seconds - prefill_s, 1e-9), of_tokens)
            captions = [captioner._to_scored_caption(one).caption for one in generated]
            score_call = partial(captioner._clip_scores, queries, captions)
            of_score = torch_flops(score_call) / len(captions)
            self._measure(score, score_call, of_score)
            totals.append(of_prefill + of_tokens + of_score)
        self._measure("detokenise", lambda: [captioner._to_scored_caption(one) for one in generated])
        return totals[0], totals[1]

    def _whole_loop(self, pixels: Sequence[Pixels], lengths: tuple[int, ...]) -> float:
        """Returns the images per second of `caption_batches`, the best of some repeats."""
        batches = max(1, self.options.images // self.options.batch_size)
        with self._planned(lengths):
            seconds = self._seconds(lambda: list(self.captioner.caption_batches([(pixels, None)] * batches)))
        return batches * len(pixels) / seconds

    @contextmanager
    def _planned(self, lengths: tuple[int, ...]) -> Iterator[None]:
        before = self.captioner.generation
        strategy = type("Planned", (PlannedLengths,), {"plan": lengths})
        self.captioner.generation = replace(before, strategy=strategy)
        yield
        self.captioner.generation = before

    def _measure(self, name: str, call: Callable[[], object], flops: float = 0.0) -> None:
        self._add(name, self._seconds(call), flops)

    def _add(self, name: str, seconds: float, flops: float) -> None:
        self.stages.append((name, self.options.batch_size / seconds, flops))

    def _seconds(self, call: Callable[[], object]) -> float:
        """Returns the least time of some calls after one warm-up; the least, as other processes only add to it."""
        call()
        times = []
        for _ in range(self.options.repeats):
            start = time.perf_counter()
            call()
            if self.captioner.model.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    def _vary(self, crop: Pixels) -> Pixels:
        """Makes each image's pixels its own, so that each retrieves other captions."""
        noise = self.rng.integers(0, 64, crop.vision.shape, dtype=np.uint8)
        return replace(crop, vision=crop.vision // 2 + noise)

    def _fast_decode_difference(self) -> float:
        plan = self.captioner.crop_plan
        fast = replace(plan, decode="fast")
        differences = [
            np.abs(plan.crop(photo).vision.astype(int) - fast.crop(photo).vision.astype(int)).mean()
            for photo in set(self.photos)
        ]
        return float(np.mean(differences))


# --- counted operations, each per image ----------------------------------------------------------------------------


def vision_flops(model: SmallCapModel) -> float:
    """Of the vision encoder."""
    config = model.config.vision
    hidden, patch = config["hidden_size"], config["patch_size"]
    tokens = _encoder_tokens(model)
    patches = tokens - 1
    layer = 4 * hidden**2 + 2 * hidden * config["intermediate_size"] + 2 * tokens * hidden
    return 2.0 * (patches * 3 * patch**2 * hidden + config["num_hidden_layers"] * tokens * layer)


def retrieval_flops(captioner: Captioner) -> float:
    """Of the retrieval encoder: a projection where it shares the vision encoder's pass, else counted by torch."""
    encoder = captioner.retrieval_encoder
    assert encoder is not None
    if captioner._shares_encoder:
        return 2.0 * captioner.model.config.decoder.encoder_hidden_size * encoder.dim
    size = encoder.preprocessing.size_px
    pixels = torch.zeros(1, 3, size, size, device=encoder.device, dtype=captioner.model.dtype)
    return torch_flops(lambda: encoder.encode_images(pixels))


def torch_flops(call: Callable[[], object]) -> float:
    """Returns the operations of a call as torch counts them: all matrix products and convolutions, padding included."""
    packed = {torch.ops.mkldnn._linear_pointwise: _packed_linear_flops}  # not in torch's own table
    with FlopCounterMode(display=False, custom_mapping=packed) as counter:
        call()
    return float(counter.get_total_flops())


def _packed_linear_flops(x_shape: Sequence[int], weight_shape: Sequence[int], *_: object, **__: object) -> int:
    return 2 * math.prod(x_shape) * weight_shape[0]


def prefill_flops(model: SmallCapModel, prompt_tokens: int) -> float:
    """Of the image's cross-attention keys and values, the prompt, and the first token's logits.

    The last layer computes of the prompt its keys and values, and all else of its last token.
    """
    config = model.config.decoder
    projected = 2.0 * _encoder_tokens(model) * config.encoder_hidden_size * 2 * config.cross_attention_size
    causal = prompt_tokens * (prompt_tokens + 1) / 2  # pairs of tokens that attend
    inner_layer = prompt_tokens * _token_flops(model) + 4.0 * causal * config.hidden_size
    keys_and_values = 2.0 * (prompt_tokens - 1) * 2 * config.hidden_size**2
    last_layer = keys_and_values + _token_flops(model) + 4.0 * prompt_tokens * config.hidden_size
    return config.num_layers * projected + (config.num_layers - 1) * inner_layer + last_layer + _head_flops(config)


def decode_flops(model: SmallCapModel, prompt_tokens: int, length: int, num_beams: int) -> float:
    """Of all steps after the first token of a caption of `length` tokens."""
    config = model.config.decoder
    total = 0.0
    for step in range(1, length):
        attention = 4.0 * (prompt_tokens + step) * config.hidden_size
        total += num_beams * (config.num_layers * (_token_flops(model) + attention) + _head_flops(config))
    return total


def _token_flops(model: SmallCapModel) -> float:
    """Of one token in one layer, self-attention's scores excluded."""
    config = model.config.decoder
    hidden, cross = config.hidden_size, config.cross_attention_size
    weights = 4 * hidden**2 + 2 * hidden * cross + 2 * hidden * config.ffn_size
    return 2.0 * weights + 4.0 * _encoder_tokens(model) * cross


def _head_flops(config: DecoderConfig) -> float:
    return 2.0 * config.hidden_size * config.vocab_size


def _encoder_tokens(model: SmallCapModel) -> int:
    config = model.config.vision
    return int((config["image_size"] // config["patch_size"]) ** 2 + 1)


# --- what is measured ----------------------------------------------------------------------------------------------


def build_captioner(options: BenchmarkOptions, dtype: str, folder: Path) -> Captioner:
    """Returns a captioner of the published sizes with random weights, over an index of random captions in `folder`."""
    model = build_model(options.reduce_factor, options.device, dtype)
    encoder = build_retrieval_encoder(options.retrieval_encoder, model)
    vectors = np.random.default_rng(0).standard_normal((options.captions, encoder.dim), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    retriever = write_index(folder, vectors, random_captions(options.captions), encoder.identity)
    generation = GenerationConfig(num_beams=options.num_beams)
    retriever.use_device(options.device)
    captioner = Captioner(model, build_tokenizer(), encoder, retriever, options.k, generation)
    captioner.pack()
    if options.compile:
        captioner.compile_encoders()
    return captioner


def build_model(reduce_factor: int, device: str, dtype: str) -> SmallCapModel:
    """Returns CLIP ViT-B/32 and GPT-2 124M joined by untrained cross-attention, the same at every call."""
    torch.manual_seed(0)
    decoder = replace(GPT2_124M, cross_attention_reduce_factor=reduce_factor)
    model = SmallCapModel(SmallCapConfig({"vision_config": VIT_B_32}, decoder, EOS_TOKEN_ID, PAD_TOKEN_ID))
    return model.to(device=torch.device(device), dtype=getattr(torch, dtype)).eval().requires_grad_(False)


def realistic_lengths(count: int) -> tuple[int, ...]:
    """Returns caption lengths in tokens, eos included, spread as those of COCO's captions are."""
    drawn = np.random.default_rng(0).normal(_MEAN_LENGTH, _LENGTH_SPREAD, count)
    return tuple(int(length) for length in drawn.round().clip(6, 20))


def random_captions(count: int) -> list[str]:
    """Returns captions of words that are one token each."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(_CAPTION_WORDS[0], _CAPTION_WORDS[1] + 1, count)
    words = np.char.add("w", rng.integers(0, _WORDS, lengths.sum()).astype(str))
    return [" ".join(of_caption) for of_caption in np.split(words, lengths.cumsum()[:-1])]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with GPT-2's vocabulary size, to which words and punctuation are tokens."""
    words = ["!", "Similar", "images", "show", "This", "image", "shows", "w", "x", "y", "z", "?", ",", "."]
    words += [f"w{i}" for i in range(_WORDS)]
    words += [f"unused{i}" for i in range(GPT2_124M.vocab_size - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def write_index(folder: Path, vectors: np.ndarray, texts: list[str], identity: EncoderIdentity) -> Retriever:
    """Writes a version with one Flat shard and opens it."""
    rows, dim = vectors.shape
    index = faiss.IndexFlatIP(dim)
    faiss.write_index(index, str(folder / "template.faiss"))
    index.add(vectors)
    faiss.write_index(index, str(folder / "shard.faiss"))
    columns = [np.arange(rows), texts, [["random"]] * rows, [None] * rows]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, CAPTION_STORE_COLUMNS, strict=True)]
    write_caption_file(folder / "captions.arrow", pa.record_batch(arrays, schema=CAPTION_STORE_COLUMNS))
    manifest = IndexManifest(
        encoder=identity,
        dim=dim,
        index_key="Flat",
        template=FileEntry.adopt(folder / "template.faiss", folder, "template"),
        shards=(ShardEntry.adopt(folder / "shard.faiss", folder, "shard", first_id=0, rows=rows),),
        captions=(ShardEntry.adopt(folder / "captions.arrow", folder, "captions", first_id=0, rows=rows),),
        max_captions_per_image=0,
        sources=(SourceEntry(uri="random", name="random", rows=rows, sha256="0" * 64),),
        filters={},
        dropped={},
        builder_version="benchmark",
        created_at="",
    ).with_index_id()
    return Retriever(manifest, folder)


def build_retrieval_encoder(name: str, model: SmallCapModel) -> RetrievalEncoder:
    """Returns a random retrieval encoder: `shared` has the vision encoder's weights, others are open_clip's."""
    return _SharedEncoder(model) if name == "shared" else _RandomOpenCLIP(name, model)


class _SharedEncoder(HFRetrievalEncoder):
    """A CLIP ViT-B/32 whose vision tower is the model's."""

    def __init__(self, model: SmallCapModel) -> None:
        clip = CLIPModel(
            CLIPConfig(vision_config=VIT_B_32, text_config={"vocab_size": GPT2_124M.vocab_size}, projection_dim=512)
        )
        clip.vision_model.load_state_dict(model.encoder.transformer.state_dict())
        self._model = clip.eval().to(model.device, model.dtype)
        self._tokenizer = build_tokenizer()
        self._tokenizer.pad_token = "!"
        self._max_tokens = 77
        identity = EncoderIdentity(spec="hf:random", weights_sha256="0" * 64, dim=512)
        RetrievalEncoder.__init__(self, identity, model.encoder.preprocessing, model.device)


class _RandomOpenCLIP(OpenCLIPRetrievalEncoder):
    """An architecture of open_clip with random weights."""

    def __init__(self, name: str, model: SmallCapModel) -> None:
        import open_clip

        config = open_clip.get_model_config(name)
        if config is None:
            raise ConfigError("open_clip has no such architecture.", where=name, remedy="See open_clip.list_models().")
        self._model = open_clip.create_model(name).eval().to(model.device, model.dtype)
        self._model.visual.to(memory_format=torch.channels_last)
        self._tokenizer = open_clip.get_tokenizer(name)
        identity = EncoderIdentity(spec=f"open_clip:{name}/random", weights_sha256="0" * 64, dim=config["embed_dim"])
        size = config["vision_cfg"]["image_size"]
        RetrievalEncoder.__init__(self, identity, Preprocessing(size, crop_rounding="nearest"), model.device)


def describe_machine(captioner: Captioner) -> dict[str, Any]:
    """Returns what the figures hold for: processor or GPU, threads, precision, versions and commit."""
    device = captioner.model.device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
        name = name or platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "dtype": str(captioner.model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "commit": source_commit(),
    }


def source_commit() -> str:
    """Returns the repository's commit, `+` behind it where files differ; empty outside a repository."""
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def make_photo() -> bytes:
    """Returns a JPEG file of a photograph's size and detail: smooth noise at several scales."""
    rng = np.random.default_rng(0)
    layers = [
        np.asarray(
            Image.fromarray(rng.integers(0, 256, (size * 3 // 4, size, 3), dtype=np.uint8)).resize(_PHOTO_PX), float
        )
        for size in (8, 32, 128)
    ]
    buffer = io.BytesIO()
    Image.fromarray(np.average(layers, axis=0, weights=[4, 2, 1]).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
