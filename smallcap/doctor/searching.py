"""Proves that this device's search finds the nearest captions: against every vector's score, and against the CPU's."""

from __future__ import annotations

from collections.abc import Iterator

import faiss
import numpy as np

from smallcap.benchmark.random_content import write_random_index
from smallcap.config import Device
from smallcap.doctor.report import Finding, attempt, fail, ok
from smallcap.index.manifest import EncoderIdentity
from smallcap.index.retriever import Neighbour, Retriever
from smallcap.machine.precision import resolve_device
from smallcap.storage import scratch_folder

ROWS = {"cpu": 20_000, "cuda": 300_000}
_DIM, _QUERIES, _K = 512, 64, 4
_TOLERANCE = 1e-5  # of a cosine in float32
_REMEDIES = {
    "search": "Install faiss again with constraints.txt, and report the line.",
    "gpu search": "Search on the CPU (--search-device cpu), install torch and faiss again with constraints.txt, and "
    "report the line.",
}


def prove_search(wanted: Device, rows: int | None = None) -> Iterator[Finding]:
    """Searches an index of random vectors on the CPU and, if it is another device, there.

    Args:
        wanted: The device.
        rows: Number of vectors; by default as many as the device searches in a moment.
    """
    device = resolve_device(wanted)
    rows = rows or ROWS[device]
    with scratch_folder() as folder:
        retriever = write_random_index(folder, rows, EncoderIdentity(spec="random", weights_sha256="0" * 64, dim=_DIM))
        vectors = faiss.read_index(str(folder / retriever.manifest.shards[0].file)).reconstruct_n(0, rows)
        noise = np.random.default_rng(1).standard_normal((_QUERIES, _DIM), dtype=np.float32)
        queries = vectors[:_QUERIES] + noise / np.linalg.norm(noise, axis=1, keepdims=True)
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
        scores = queries @ vectors.T  # [B, N]
        on_cpu = retriever.search(queries, _K)
        yield _against_all_scores("search", retriever, on_cpu, scores)

        def prove_gpu() -> Iterator[Finding]:
            retriever.use_device(device, "cuda")
            found = retriever.search(queries, _K)
            yield _against_all_scores("gpu search", retriever, found, scores)
            yield _against_the_cpus(found, on_cpu)

        if device != "cpu":
            yield from attempt("gpu search", prove_gpu, _REMEDIES["gpu search"])


def _against_all_scores(
    subject: str, retriever: Retriever, found: list[list[Neighbour]], scores: np.ndarray
) -> Finding:
    """Compares neighbours with the best of all scores: [B, N]."""
    best = -np.sort(-np.partition(scores, -_K, axis=1)[:, -_K:], axis=1)
    ids = np.array([[neighbour.caption_id for neighbour in nearest] for nearest in found])
    given = np.array([[neighbour.score for neighbour in nearest] for nearest in found])
    shown = f"{len(ids)} queries in {scores.shape[1]:,} vectors by {retriever.search_backend}"
    wrong = (np.abs(np.take_along_axis(scores, ids, axis=1) - best) > _TOLERANCE) | (np.abs(given - best) > _TOLERANCE)
    if not np.isfinite(given).all() or wrong.any():
        return fail(
            subject, f"{shown}: {int(wrong.any(axis=1).sum())} do not get their nearest captions", _REMEDIES[subject]
        )
    return ok(subject, f"{shown} find the nearest by all scores")


def _against_the_cpus(found: list[list[Neighbour]], expected: list[list[Neighbour]]) -> Finding:
    """Compares the GPU's neighbours with the CPU's, which an exact search gives as well, id by id."""
    differing = sum(
        [neighbour.caption_id for neighbour in one] != [neighbour.caption_id for neighbour in other]
        for one, other in zip(found, expected, strict=True)
    )
    subject = "gpu search"
    if differing:
        shown = f"{differing} of {len(found)} queries get other captions than on the CPU"
        return fail(subject, shown, _REMEDIES[subject])
    return ok(subject, f"{len(found)} queries get the same captions as on the CPU")
