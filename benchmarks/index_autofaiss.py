"""autofaiss's side of the index benchmark: steps that `benchmarks.index` runs in an interpreter with autofaiss.

autofaiss chooses everything except the memory: key, training, search parameters, query time (10 ms). This module
imports nothing from smallcap, whose faiss is another package.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from autofaiss import build_index
from autofaiss.external.optimize import get_optimal_index_keys_v2

from benchmarks.measuring import queries_per_s

_RECALL_AT = (4, 10)
_MOST = {"efSearch": 2**14, "nprobe": 6144}  # the largest that autofaiss itself tries


def choose(rows: int, dim: int, budgets: list[str]) -> dict[str, Any]:
    """Returns the key that autofaiss chooses for each budget in bytes; the budget `default` is its default."""
    default = inspect.signature(build_index).parameters["max_index_memory_usage"].default
    memories = {budget: default if budget == "default" else f"{budget}B" for budget in budgets}
    keys = {budget: get_optimal_index_keys_v2(rows, dim, memory) for budget, memory in memories.items()}
    return {
        "keys": {budget: best[0] if best else None for budget, best in keys.items()},
        "versions": {"autofaiss": version("autofaiss"), "faiss": faiss.__version__, "numpy": np.__version__},
    }


def build(embeddings: str, out: str, budget: str, build_memory: int, threads: int) -> dict[str, Any]:
    """Builds an index with autofaiss, for a given memory of the index and of the build, or with its defaults."""
    equal = {"max_index_memory_usage": f"{budget}B", "current_memory_available": f"{build_memory}B"}
    memory = {} if budget == "default" else equal
    folder = Path(out)
    folder.mkdir(parents=True)
    start = time.perf_counter()
    index, infos = build_index(
        embeddings,
        index_path=str(folder / "knn.index"),
        index_infos_path=str(folder / "infos.json"),
        metric_type="ip",
        nb_cores=threads,
        **memory,
    )
    seconds = time.perf_counter() - start
    assert index is not None, "autofaiss built nothing; its messages above say why"
    return {
        "build_s": seconds,
        "index_key": infos["index_key"],
        "index_param": infos["index_param"],
        "index_bytes": (folder / "knn.index").stat().st_size,
    }


class _Tuned:
    """An index at one search setting; `ht` and the like stay as autofaiss chose them."""

    def __init__(self, index: Any, param: str) -> None:
        self._index = index
        self._settings = dict(setting.split("=") for setting in param.split(",") if setting)
        self.name = next((name for name in ("nprobe", "efSearch") if name in self._settings), None)
        self._both = {"nprobe", "efSearch"} <= set(self._settings)  # a graph finds the lists
        self.most = _MOST[self.name] if self.name else 0
        if self.name == "nprobe":
            self.most = min(self.most, faiss.extract_index_ivf(index).nlist)

    def use(self, value: int | None = None) -> str:
        """Sets `name`, by default to autofaiss's choice; returns all settings."""
        settings = dict(self._settings)
        if value is not None and self.name:
            settings[self.name] = str(value)
            if self._both:
                settings["efSearch"] = str(2 * value)  # as autofaiss ties them
        text = ",".join(f"{name}={setting}" for name, setting in settings.items())
        parameters: Any = faiss.ParameterSpace()  # its stub has only one of the overloads
        parameters.set_index_parameters(self._index, text)
        return text


def search(
    out: str, queries: str, k: int, batches: list[int], seconds: float, threads: int, truth: str, targets: list[float]
) -> dict[str, Any]:
    """Measures the index at autofaiss's setting, and at the smallest setting that reaches each target of recall@4."""
    faiss.omp_set_num_threads(threads)
    index = faiss.read_index(str(Path(out) / "knn.index"))
    infos = json.loads((Path(out) / "infos.json").read_text())
    vectors, exact = np.load(queries), np.load(truth)
    tuned = _Tuned(index, infos["index_param"])

    @cache
    def recalls(value: int | None) -> dict[int, float]:
        tuned.use(value)
        found = index.search(vectors, max(_RECALL_AT))[1]
        return {k: float((found[:, :k, None] == exact[:, None, :k]).any(axis=1).mean()) for k in _RECALL_AT}

    def measure(value: int | None) -> dict[str, Any]:
        recall, setting = recalls(value), tuned.use(value)
        rates = queries_per_s(lambda batch: index.search(batch, k), vectors, batches, seconds)
        return {"param": setting, "recall": recall, "queries_per_s": rates}

    result: dict[str, Any] = {"own": measure(None), "at_recall": {}}
    for target in targets:
        value, best = _least_setting(tuned, recalls, target)
        reached = {"reached": True, **measure(value)} if value else {"reached": False}
        result["at_recall"][str(target)] = {**reached, "most": best}
    return result


def _least_setting(
    tuned: _Tuned, recalls: Callable[[int | None], dict[int, float]], target: float
) -> tuple[int | None, dict[str, Any]]:
    """Returns the smallest setting with this recall@4, to a twentieth, and the recall at the largest one tried."""
    low, high = 0, 8
    while True:
        high = min(high, max(1, tuned.most))
        value = high if tuned.name else None
        setting, recall = tuned.use(value), recalls(value)[4]
        if recall >= target:
            break
        if high >= tuned.most:
            return None, {"param": setting, "recall@4": recall}
        low, high = high, 2 * high
    seen = {"param": setting, "recall@4": recall}
    while high - low > max(1, high // 20):
        middle = (low + high) // 2
        low, high = (low, middle) if recalls(middle)[4] >= target else (middle, high)
    return high, seen
