"""Measures the captioner at real sizes with random weights: each stage alone, and the whole loop.

It runs the code that captions (`Captioner` and its steps, the engine, `Retriever` over an index on disk). The caller
says how the whole loop goes, since a job's way leads through tables that only the job knows. Only the weights, the
captions in the index and, if none are given, the photographs are random (`smallcap.benchmark.random_content`).
Generation is measured at realistic caption lengths and at the full 25 tokens.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smallcap import storage
from smallcap.benchmark.operations import decode_flops, prefill_flops, retrieval_flops, torch_flops, vision_flops
from smallcap.benchmark.random_content import (
    PHOTO_PX,
    PlannedLengths,
    build_model,
    build_retrieval_encoder,
    build_tokenizer,
    make_photo,
    realistic_lengths,
    write_random_index,
)
from smallcap.captioner import Captioner
from smallcap.captioner_setup import CaptionerOptions
from smallcap.config import BenchmarkOptions
from smallcap.decoding.engine import prefill
from smallcap.images.crops import CropPlan, Pixels
from smallcap.images.decode import crop_pixels, decode_image, decode_scaled
from smallcap.machine.description import describe_machine
from smallcap.machine.precision import find_device, matrix_rate, resolve_device, resolve_dtype
from smallcap.machine.process_memory import keep_freed_memory

_LOADED_PHOTOS = 64  # of a batch, to measure loading: that takes the same time for each, on one core
_MATRIX_SHAPE = {"cpu": (1024, 768, 3072), "cuda": (8192, 8192, 8192)}


@dataclass(frozen=True)
class StageResult:
    """The speed of one stage alone."""

    stage: str
    images_per_s: float
    gflop_per_image: float | None = None  # None if a stage has no matrix products
    tflops: float | None = None  # achieved
    share: float | None = None  # of the measured matrix rate


@dataclass(frozen=True)
class BenchmarkResult:
    """Everything that was measured; `smallcap bench` prints it as JSON."""

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


def build_captioner(options: BenchmarkOptions, dtype: str, folder: Path) -> Captioner:
    """Returns a captioner of the published sizes with random weights, over an index of random captions in `folder`."""
    model = build_model(options.reduce_factor, options.device, dtype)
    encoder = build_retrieval_encoder(options.retrieval_encoder, model)
    retriever = write_random_index(folder, options.captions, encoder.identity)
    retriever.use_device(options.device)
    captioner = Captioner(
        model, build_tokenizer(), encoder, retriever, CaptionerOptions(k=options.k, num_beams=options.num_beams)
    )
    captioner.pack()
    if options.compile:
        captioner.compile_encoders()
    return captioner


MakeLoop = Callable[[Captioner, Sequence[Sequence[Pixels]]], Callable[[], int]]
"""Takes batches of crops, and returns a function that captions them all and returns how many they are."""


def run_benchmark(options: BenchmarkOptions, make_loop: MakeLoop) -> BenchmarkResult:
    """Measures every stage and the whole loop.

    Args:
        options: What to measure.
        make_loop: The whole loop.

    Raises:
        ConfigError: The retrieval encoder is unknown, or the device is not here.
    """
    options = options.model_copy(update={"device": str(find_device(resolve_device(options.device)))})
    dtype = resolve_dtype(options.dtype, options.device)
    with storage.scratch_folder() as folder:
        return measure_captioner(build_captioner(options, dtype, folder), options, make_loop)


@torch.inference_mode()
def measure_captioner(captioner: Captioner, options: BenchmarkOptions, make_loop: MakeLoop) -> BenchmarkResult:
    """Measures a captioner that `build_captioner` has made, and every stage of it; see `run_benchmark`."""
    keep_freed_memory()
    photos = [Path(photo).read_bytes() for photo in options.photos] or [make_photo()]
    benchmark = _Benchmark(options, captioner, photos, make_loop)
    benchmark.run()
    return benchmark.result()


class _Benchmark:
    """One captioner being measured."""

    def __init__(
        self, options: BenchmarkOptions, captioner: Captioner, photos: list[bytes], make_loop: MakeLoop
    ) -> None:
        self.options, self.captioner, self.make_loop = options, captioner, make_loop
        self.photos = [photos[i % len(photos)] for i in range(options.batch_size)]
        self.rng = np.random.default_rng(0)
        self.stages: list[tuple[str, float, float]] = []  # name, images/s, FLOP per image
        self.matrix_rates = [self._matrix_rate()]
        self.lengths = realistic_lengths(options.batch_size)
        self.full = (captioner.generation.max_new_tokens,) * options.batch_size

    def run(self) -> None:
        """Measures the stages in the order in which an image goes through them, then the loop."""
        pixels = self._measure_images()
        hidden_states, embeddings, encoding_flops = self._measure_encoders(pixels)
        generation_flops = self._measure_generation(pixels, hidden_states, embeddings)
        self.flops = [encoding_flops + flops for flops in generation_flops]  # per image at both lengths
        self.rates = self._measure_loop(pixels)
        self.matrix_rates.append(self._matrix_rate())

    def result(self) -> BenchmarkResult:
        """Returns what was measured, against the machine's rate: the best of products alone, any stage, and the loop.

        A processor is not as fast all the time. So products alone may be slower than what was measured a moment later,
        and without the others a share could be more than all.
        """
        (rate, full_rate), (flops, full_flops) = self.rates, self.flops
        reached = [speed * count for _, speed, count in self.stages] + [rate * flops, full_rate * full_flops]
        matrix = max(*self.matrix_rates, *reached)
        model = self.captioner.model
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
            options=self.options.model_dump() | {"photos": len(self.options.photos)},
            machine=describe_machine(torch.get_num_threads(), str(model.device))
            | {"dtype": str(model.dtype).removeprefix("torch.")},
        )

    def _matrix_rate(self) -> float:
        model = self.captioner.model
        return matrix_rate(model.dtype, str(model.device), _MATRIX_SHAPE[model.device.type], seconds=1.0)

    def _measure_images(self) -> list[Pixels]:
        """Measures decoding and cropping; returns crops that all differ."""
        plan, photos = self.captioner.crop_plan, self.photos[:_LOADED_PHOTOS]
        wanted = [preprocessing for preprocessing in (plan.vision, plan.retrieval) if preprocessing]
        least_px = max(preprocessing.size_px for preprocessing in wanted)
        images = [decode_image(photo) for photo in photos]
        measure = partial(self._measure, images=len(photos))
        measure("decode image", lambda: [decode_image(photo) for photo in photos])
        measure("decode image, fast", lambda: [decode_scaled(photo, least_px) for photo in photos])
        measure("preprocess", lambda: [crop_pixels(image, crop) for crop in wanted for image in images])
        fast = replace(plan, decode="fast")
        for longer_px in PHOTO_PX:
            photo = make_photo(longer_px)
            measure(f"load JPEG, {longer_px} px, fast", partial(_crop_often, fast, photo, len(photos)))
        crops = {photo: plan.crop(photo) for photo in set(self.photos)}
        return [self._vary(crops[photo]) for photo in self.photos]

    def _measure_encoders(self, pixels: list[Pixels]) -> tuple[Tensor, np.ndarray, float]:
        """Measures everything up to the prompt; returns hidden states, embeddings and the operations."""
        captioner = self.captioner
        assert captioner.retriever is not None
        hidden_states, class_tokens = captioner.encode(pixels)
        embeddings = captioner.embed(pixels, class_tokens)
        neighbours = captioner.retrieve(embeddings)
        self.prompts = captioner.prompt(neighbours)
        vision, retrieval = vision_flops(captioner.model), retrieval_flops(captioner)
        searched = sum(manifest.ntotal for manifest in captioner.retriever.manifests)
        search = 2.0 * searched * captioner.retriever.dim
        self._measure("vision encoder", lambda: captioner.encode(pixels), vision)
        self._measure("retrieval encoder", lambda: captioner.embed(pixels, class_tokens), retrieval)
        self._measure("search", lambda: captioner.retrieve(embeddings), search)
        self._measure("tokenise", lambda: captioner.prompt(neighbours))
        return hidden_states, embeddings, vision + retrieval + search

    def _measure_generation(
        self, pixels: list[Pixels], hidden_states: Tensor, embeddings: np.ndarray
    ) -> tuple[float, float]:
        """Measures everything from the prompt on; returns the operations at realistic and at full length."""
        captioner, model, prompts = self.captioner, self.captioner.model, self.prompts
        flops_of_prefill = statistics.mean(prefill_flops(model, len(prompt)) for prompt in prompts)
        self._measure(
            "prefill",
            lambda: prefill(model.decoder, hidden_states, prompts, captioner.generation, stepper=model.stepper),
            flops_of_prefill,
        )
        totals = []
        for name, score_name, lengths in (
            ("decode tokens", "clip score", self.lengths),
            ("decode 25 tokens", "clip score, 25 tokens", self.full),
        ):
            flops_of_tokens = statistics.mean(
                decode_flops(model, len(prompt), length, self.options.num_beams)
                for prompt, length in zip(prompts, lengths, strict=True)
            )
            with self._planned(lengths):
                generated = captioner.generate(hidden_states, prompts, pixels)
                self._add(name, self._decode_seconds(hidden_states, pixels), flops_of_tokens)
            assert [len(best.token_ids) for (best,) in generated] == list(lengths), "the planned lengths were not kept"
            texts = captioner.detokenise(generated).best
            score = partial(captioner.clip_scores, embeddings, texts)
            flops_of_score = torch_flops(score) / len(texts)
            self._measure(score_name, score, flops_of_score)
            totals.append(flops_of_prefill + flops_of_tokens + flops_of_score)
        self._measure("detokenise", lambda: captioner.detokenise(generated))
        return totals[0], totals[1]

    def _decode_seconds(self, hidden_states: Tensor, pixels: list[Pixels]) -> float:
        """Returns the time from the end of prefill to the end of generation, the shortest of several."""
        times = []
        for _ in range(self.options.repeats):
            self.captioner.generate(hidden_states, self.prompts, pixels)
            self._synchronise()
            times.append(time.perf_counter() - PlannedLengths.prefilled_at)
        return min(times)

    def _measure_loop(self, pixels: list[Pixels]) -> list[float]:
        """Returns the images per second of the whole loop over batches that all differ, at both lengths."""
        batches = [pixels]
        while len(batches) < self.options.images // self.options.batch_size:
            batches.append([self._vary(image) for image in pixels])
        loop = self.make_loop(self.captioner, batches)
        rates = []
        for lengths in (self.lengths, self.full):
            with self._planned(lengths):
                rates.append(len(batches) * len(pixels) / self._seconds(loop))
        return rates

    @contextmanager
    def _planned(self, lengths: tuple[int, ...]) -> Iterator[None]:
        before = self.captioner.generation
        strategy = type("Planned", (PlannedLengths,), {"planned": lengths})
        self.captioner.generation = replace(before, strategy=strategy)
        yield
        self.captioner.generation = before

    def _measure(self, name: str, call: Callable[[], object], flops: float = 0.0, images: int | None = None) -> None:
        """Measures a call for so many images, by default a batch."""
        self._add(name, self._seconds(call), flops, images)

    def _add(self, name: str, seconds: float, flops: float, images: int | None = None) -> None:
        self.stages.append((name, (images or self.options.batch_size) / seconds, flops))

    def _seconds(self, call: Callable[[], object]) -> float:
        """Returns the shortest time of several calls after a warm-up; other processes only add to it."""
        call()
        times = []
        for _ in range(self.options.repeats):
            start = time.perf_counter()
            call()
            self._synchronise()
            times.append(time.perf_counter() - start)
        return min(times)

    def _synchronise(self) -> None:
        if self.captioner.model.device.type == "cuda":
            torch.cuda.synchronize(self.captioner.model.device)

    def _vary(self, crop: Pixels) -> Pixels:
        """Adds noise to an image's crop, so that each image retrieves other captions."""
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


def _crop_often(plan: CropPlan, photo: bytes, times: int) -> None:
    for _ in range(times):
        plan.crop(photo)
