"""Proves on the demo's model that this device captions rightly: several ways to the same captions, compared.

Random numbers choose which images come in which batches; nothing here needs the model or the index of a run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from smallcap.benchmark.random_content import write_index
from smallcap.captioned import CaptionResult
from smallcap.captioner import Captioner
from smallcap.config import Device
from smallcap.decoding.cuda_graphs import GraphStepper, Run
from smallcap.decoding.engine import generate
from smallcap.doctor.report import Finding, attempt, fail, ok
from smallcap.images.crops import Pixels
from smallcap.index.retriever import Retriever
from smallcap.machine.precision import resolve_device, resolve_dtype
from smallcap.machine.process_memory import private_bytes
from smallcap.model.clip_encoder import load_retrieval_encoder
from smallcap.model.files import DEMO, demo_captions, demo_folder
from smallcap.phrasing import describe_gb
from smallcap.storage import scratch_folder

_CAPTIONS = 1000  # in the index
_TIE = 1e-3  # nats by which two captions' log probabilities may differ and still be a tie that rounding decides
# What a precision may change: the demo's captions in bfloat16 were 83% float32's, 0.0026 nats per token off.
_LEAST_EQUAL, _MOST_LOSS = 0.5, 0.02
_SPARE_BYTES, _SPARE_SHARE = 64 << 20, 0.1  # growth of memory between two halves that no leak makes
_REMEDIES = {
    "cpu": "Do not caption on this machine: install the versions of constraints.txt, and report the line.",
    "cuda": "Do not caption on this GPU: try --device cpu, another driver, or the versions of constraints.txt, and "
    "report the line.",
}


@dataclass(frozen=True)
class Effort:
    """How much is tried: on a CPU, what takes some seconds there."""

    images: int  # at most the demo's 48
    batches: int
    largest_batch: int


EFFORTS = {"cpu": Effort(images=16, batches=40, largest_batch=8), "cuda": Effort(48, 200, 48)}


def prove_captioning(wanted: Device, effort: Effort | None = None) -> Iterator[Finding]:
    """Captions the demo's images in several ways.

    Args:
        wanted: The device.
        effort: How much to try; by default `EFFORTS`.
    """
    device = resolve_device(wanted)
    effort = effort or EFFORTS[device]
    with scratch_folder() as folder:
        retriever = build_demo_index(folder)
        captioner = _load(retriever, device, "float32")
        files = sorted((demo_folder() / "images").glob("*.jpg"))[: effort.images]
        pool = [captioner.crop_plan.crop(file.read_bytes()) for file in files]
        expected = [result for crops in pool for result in captioner.caption_batch([crops])]
        tests: dict[str, Callable[[], Iterator[Finding]]] = {
            "batch of one": lambda: _compare_batches(captioner, pool, expected),
            "recorded steps": lambda: _compare_steps(captioner, pool),
            "random batches": lambda: _compare_pipeline(captioner, pool, expected, effort),
            "precision": lambda: _compare_precision(retriever, device, pool, expected),
        }
        if device != "cpu":
            other = Retriever(retriever.manifest, folder)  # which searches on the CPU
            tests = {"gpu against cpu": lambda: _compare_devices(other, pool, expected)} | tests
        for subject, test in tests.items():
            yield from attempt(subject, test, _REMEDIES[device])


def build_demo_index(folder: Path) -> Retriever:
    """Makes a small index of the demo's captions, embedded by its CLIP on the CPU."""
    texts = list(itertools.islice(dict.fromkeys(demo_captions()), _CAPTIONS))
    encoder = load_retrieval_encoder(DEMO)
    return Retriever(write_index(folder, encoder.encode_texts(texts), texts, encoder.identity), folder)


def _load(retriever: Retriever, device: str, dtype: str) -> Captioner:
    return Captioner.from_pretrained(DEMO, retriever, device=device, dtype=dtype)


def _compare_devices(retriever: Retriever, pool: Sequence[Pixels], found: Sequence[CaptionResult]) -> Iterator[Finding]:
    """Compares this GPU's captions in float32, and what its search found, with the CPU's."""
    on_cpu = _load(retriever, "cpu", "float32")
    expected = [result for crops in pool for result in on_cpu.caption_batch([crops])]
    yield _judge("gpu against cpu", "captions in float32", _captions(found), _captions(expected), "cuda")
    yield _judge("gpu against cpu", "retrieved captions", _retrieved(found), _retrieved(expected), "cuda")


def _compare_batches(
    captioner: Captioner, pool: Sequence[Pixels], expected: Sequence[CaptionResult]
) -> Iterator[Finding]:
    """Compares captions of one large batch with those of batches of one."""
    together, device = captioner.caption_batch(pool), captioner.model.device.type
    what = f"captions of a batch of {len(pool)}"
    yield _judge("batch of one", what, _captions(together), _captions(expected), device)


def _compare_steps(captioner: Captioner, pool: Sequence[Pixels]) -> Iterator[Finding]:
    """Compares decoding by recorded steps, first recorded and then replayed, with decoding step by step."""
    hidden_states, class_tokens = captioner.encode(pool)
    prompts = captioner.prompt(captioner.retrieve(captioner.embed(pool, class_tokens)))
    given = (captioner.model.decoder, hidden_states, prompts, captioner.generation)
    device = captioner.model.device.type
    on_gpu = device == "cuda"
    stepper = GraphStepper(None if on_gpu else _Runs())
    expected = [(tuple(best.token_ids), best.score) for best, *_ in generate(*given)]
    found = []
    for _ in range(2):
        recorded = generate(*given, stepper=stepper)
        found += [(tuple(best.token_ids), best.score) for best, *_ in recorded]
    what = "captions by CUDA graphs" if on_gpu else "captions by the steps that a GPU records, run here"
    yield _judge("recorded steps", what, found, expected * 2, device)


class _Runs:
    """Stands in for CUDA graphs on a CPU: a recording is the function itself."""

    def record(self, run: Run, undo: Run) -> Run:
        """Runs once without a trace, as what precedes a recording does."""
        run()
        undo()
        return run

    def forget(self) -> None:
        """Holds nothing."""


def _compare_pipeline(
    captioner: Captioner, pool: Sequence[Pixels], expected: Sequence[CaptionResult], effort: Effort
) -> Iterator[Finding]:
    """Compares captions of random batches in a row with those of batches of one; looks at memory half-way and after."""
    subject, device = "random batches", captioner.model.device.type
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, min(effort.largest_batch, len(pool)) + 1, effort.batches)
    batches = [rng.choice(len(pool), size, replace=False).tolist() for size in sizes]
    found: list[CaptionResult] = []
    memory = []
    outcomes = captioner.caption_batches(([pool[place] for place in batch], None) for batch in batches)
    for number, outcome in enumerate(outcomes, 1):
        found += outcome
        if number in (effort.batches // 2, effort.batches):
            memory.append(_memory(captioner.model.device))
    wanted = [expected[place] for batch in batches for place in batch]
    what = f"captions of {effort.batches} random batches in a row"
    yield _judge(subject, what, _captions(found), _captions(wanted), device)
    middle, end = memory
    grown = f"the process holds {describe_gb(end)} after them, {describe_gb(middle)} half-way"
    if end - middle > max(_SPARE_BYTES, _SPARE_SHARE * middle):
        yield fail(subject, f"memory grows: {grown}", _REMEDIES[device])
    else:
        yield ok(subject, f"memory is steady: {grown}")


def _memory(device: torch.device) -> int:
    """Returns the bytes that this process holds: on the GPU at its peak, or of the machine's memory."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else private_bytes()


def _compare_precision(
    retriever: Retriever, device: str, pool: Sequence[Pixels], expected: Sequence[CaptionResult]
) -> Iterator[Finding]:
    """Compares captions in the precision that `auto` takes with those in float32; says nothing where it is float32."""
    dtype = resolve_dtype("auto", device)
    if dtype == "float32":
        return
    found = _load(retriever, device, dtype).caption_batch(pool)
    pairs = [(one, other) for one, other in zip(found, expected, strict=True) if one.caption == other.caption]
    losses = [abs(_per_token(one) - _per_token(other)) for one, other in pairs]
    loss = sum(losses) / max(1, len(losses))
    shown = f"{len(pairs)} of {len(pool)} captions in {dtype} are float32's, their scores {loss:.4f} nats per token off"
    if len(pairs) >= _LEAST_EQUAL * len(pool) and loss <= _MOST_LOSS:  # false for NaN
        yield ok("precision", shown)
    else:
        expected_text = f"at least {_LEAST_EQUAL:.0%}, and at most {_MOST_LOSS}, are usual"
        yield fail("precision", f"{shown}; {expected_text}", "Caption with --dtype float32.")


def _per_token(result: CaptionResult) -> float:
    assert result.logprob is not None and result.num_tokens is not None
    return result.logprob / result.num_tokens


def _captions(results: Sequence[CaptionResult]) -> list[tuple[object, float]]:
    return [(result.caption, result.logprob or 0.0) for result in results]


def _retrieved(results: Sequence[CaptionResult]) -> list[tuple[object, float]]:
    return [(neighbour.caption_id, neighbour.score) for result in results for neighbour in result.neighbours]


def _judge(
    subject: str,
    what: str,
    found: Sequence[tuple[object, float]],
    expected: Sequence[tuple[object, float]],
    device: str,
) -> Finding:
    """Compares pairs of something and its score, of which those with nearly the same score are ties."""
    if len(found) != len(expected):
        return fail(subject, f"{len(found)} {what} instead of {len(expected)}", _REMEDIES[device])
    ties = others = 0
    for (one, score), (other, other_score) in zip(found, expected, strict=True):
        is_near = abs(score - other_score) <= _TIE  # false for NaN
        ties += one != other and is_near
        others += not is_near
    if others:
        return fail(subject, f"{others} of {len(found)} {what} differ", _REMEDIES[device])
    tied = f", {ties} of them other ones with the same score" if ties else ""
    return ok(subject, f"{len(found)} {what} are equal{tied}")
