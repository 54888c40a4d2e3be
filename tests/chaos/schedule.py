"""Owns what a seed stands for: a job, the machines that it runs on, and what happens to it. Knows nothing of how."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

Job = Literal["caption", "build", "train"]
Place = Literal["s3", "small disk"]

BEFORE = -1.0  # the moment before the job starts


@dataclass(frozen=True)
class Disturbance:
    """One thing that happens.

    Attributes:
        kind: Its name in `disturbances.KINDS`.
        after: Share of the job's work that is done by then, from 0 to 1, or `BEFORE`.
        lasts_s: How long it lasts, in seconds, where it ends by itself.
        number: How often it happens; for a permission, how many requests are granted before.
    """

    kind: str
    after: float
    lasts_s: float = 0.0
    number: int = 1

    def __str__(self) -> str:
        if self.kind == "permission revoked":
            return f"{self.kind} after {self.number} requests"
        moment = "before the start" if self.after == BEFORE else f"after {self.after:.0%}"
        lasts = f" for {self.lasts_s:.0f} s" if self.lasts_s else ""
        times = f" {self.number} times" if self.number > 1 else ""
        return f"{self.kind}{times}{lasts} {moment}"


@dataclass(frozen=True)
class Schedule:
    """What one seed stands for.

    Attributes:
        seed: The seed.
        job: What runs.
        disturbances: What happens, in this order.
        goes_on: The first command must end well by itself. Otherwise it may stop with one message, and the same command
            must finish the work.
        out: Where the output is.
        skew_s: Seconds by which the clock of the last node is wrong.
        nodes: CPUs of the head and of each other node.
    """

    seed: int
    job: Job
    disturbances: tuple[Disturbance, ...]
    goes_on: bool
    out: Place = "s3"
    skew_s: int = 0
    nodes: tuple[int, ...] = (1, 2, 2)

    def __str__(self) -> str:
        parts = [*map(str, self.disturbances)]
        if self.skew_s:
            parts.insert(0, f"a node's clock is wrong by {self.skew_s} s")
        return f"{self.job}: " + "; ".join(parts)


def draw(seed: int) -> Schedule:
    """Returns the schedule of a seed: the kind goes by the seed in turn, and what is left open is drawn from it."""
    rng = random.Random(seed)
    job, *named = _TURNS[seed % len(_TURNS)]
    kinds = [kind for kind in named if kind != _CLOCK]
    moments = sorted(rng.uniform(0.0, 0.7) for _ in kinds)
    disturbances = tuple(
        Disturbance(
            kind,
            BEFORE if kind in _BEFORE else round(moment, 2),
            float(rng.randint(*_LASTS_S[kind])) if kind in _LASTS_S else 0.0,
            rng.randint(*_NUMBERS[kind]) if kind in _NUMBERS else 1,
        )
        for kind, moment in zip(kinds, moments, strict=True)
    )
    skew_s = rng.choice((-1, 1)) * rng.randint(120, 720) if _CLOCK in named else 0
    out: Place = "small disk" if "output disk full" in kinds else "s3"
    return Schedule(seed, job, disturbances, not set(kinds) & _STOPPING, out, skew_s)


_CLOCK = "clock wrong"
_BEFORE = {"cache disk full", "spill disk full", "permission revoked"}
_NUMBERS = {"actor killed": (1, 3), "worker killed": (1, 3), "permission revoked": (50, 1_000)}
_LASTS_S = {
    "node frozen": (15, 60),
    "S3 killed": (5, 30),
    "S3 frozen": (10, 40),
    "memory taken": (10, 20),
    "S3 unsteady": (15, 40),
    "S3 answers 503": (5, 30),
}
_STOPPING = {
    "head killed",
    "driver killed",
    "driver told to stop",
    "credentials expired",
    "permission revoked",
    "output disk full",
    "cache disk full",
    "second driver",
    "cached file damaged",
    "memory taken",
}
_TURNS: tuple[tuple[Job, *tuple[str, ...]], ...] = (
    ("caption", "actor killed"),
    ("caption", "worker killed"),
    ("caption", "node killed"),
    ("caption", "node frozen"),
    ("caption", "node killed", "node added"),
    ("caption", "head killed"),
    ("caption", "driver killed", "driver killed"),
    ("caption", "driver told to stop"),
    ("caption", "S3 killed"),
    ("caption", "S3 frozen"),
    ("caption", "S3 unsteady"),
    ("caption", "S3 answers 503", "actor killed"),
    ("caption", "credentials expired"),
    ("caption", "permission revoked"),
    ("caption", "output disk full"),
    ("caption", "cache disk full"),
    ("caption", "spill disk full", "worker killed"),
    ("caption", "memory taken"),
    ("caption", "clock wrong", "node killed"),
    ("caption", "second driver"),
    ("caption", "cached file damaged"),
    ("caption", "S3 unsteady", "node killed", "driver killed"),
    ("build", "worker killed"),
    ("build", "node killed"),
    ("build", "driver killed"),
    ("build", "S3 unsteady"),
    ("build", "clock wrong", "second driver"),
    ("build", "S3 killed", "driver told to stop"),
    ("train", "driver killed"),
    ("train", "worker killed"),
    ("train", "S3 answers 503", "driver told to stop"),
    ("train", "node killed"),
)
TURNS = len(_TURNS)
