"""`--dry-run`: what a captioning run will take, computed from the cluster, the work and a few captioned batches."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal, TypeVar

from jobs.captioning.progress import describe_duration
from smallcap.machine.actor_plan import ActorPlan
from smallcap.machine.process_memory import private_bytes

Loaded = TypeVar("Loaded")

_TIMED_BATCHES = 3  # after one that warms up
_MILLION = 1_000_000


@dataclass(frozen=True)
class IndexFacts:
    """The index of a run."""

    index_id: str
    ntotal: int  # captions
    bytes: int  # of its files: disk of every node's cache, and memory that the node's actors share


@dataclass(frozen=True)
class Calibration:
    """What a few batches took."""

    images: int  # that were timed
    load_s: float  # per image, in one CPU task
    caption_s: float  # per image, in one actor
    start_s: float  # that the actor took to load, and to caption its first batch
    actor_bytes: int  # the actor's own memory, the shared pages of the index not counted
    gpu_bytes: int = 0  # the most that it took of its GPU


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run before it starts."""

    images: int | None  # to do; None where tars have not said it yet
    fragments: int  # to do
    tars: int  # of those
    done: int  # rows that are there
    duplicates: int  # left out of the list
    nodes: tuple[Mapping[str, float], ...]  # each node's CPU and GPU, as Ray counts them
    actors: ActorPlan
    batch_size: int
    index: IndexFacts | None
    gpu_hour_cost: float | None = None  # $


@dataclass(frozen=True)
class RunPlan:
    """A run's time, cost and bottleneck; see `plan_run`."""

    facts: RunFacts
    calibration: Calibration
    load_tasks: int  # that run at once beside the actors
    load_rate: float  # images/s of all tasks
    caption_rate: float  # images/s of all actors that the run starts with
    bottleneck: Literal["load", "caption"]
    cpus_to_feed: float  # that loading needs to keep those actors busy
    seconds: float | None  # of the whole run; None where the number of images is unknown
    gpu_hours: float | None  # 0 on CPUs
    gpu_hours_per_million: float
    cost: float | None  # $; None without a price, or on CPUs
    cost_per_million: float | None

    @property
    def rate(self) -> float:
        """Images/s of the run."""
        return min(self.load_rate, self.caption_rate)

    def to_json(self) -> str:
        """Returns all figures as one line of JSON."""
        return json.dumps(asdict(self) | {"rate": self.rate})

    def lines(self) -> list[str]:
        """Returns the plan for people."""
        facts, measured = self.facts, self.calibration
        named = [
            ("Images", self._images()),
            ("Cluster", self._cluster()),
            ("Actors", self._actors()),
            ("Index", self._index()),
            (
                "Measured",
                f"{measured.load_s * 1000:,.2f} ms per image in one CPU task, {measured.caption_s * 1000:,.2f} ms in "
                f"one actor, over {measured.images:,} images",
            ),
            ("Throughput", self._throughput()),
            ("Time", self._time()),
            ("Cost", self._cost()),
        ]
        if facts.actors.max_actors > facts.actors.num_actors:
            grown = facts.actors.max_actors / measured.caption_s
            needed = f"{self.cpus_to_feed / facts.actors.num_actors:,.1f} CPUs for loading to each"
            named.insert(6, ("Grown", f"{facts.actors.max_actors} actors caption {grown:,.1f} images/s, with {needed}"))
        return [f"{name + ':':12} {text}" for name, text in named if text]

    def _images(self) -> str:
        facts = self.facts
        number = f"{facts.images:,} to do" if facts.images is not None else "a number that is known once tars are read,"
        tars = f", {facts.tars:,} of them tars" if facts.tars else ""
        others = f"{facts.done:,} done before, {facts.duplicates:,} duplicates left out"
        return f"{number} in {facts.fragments:,} fragments{tars}; {others}"

    def _cluster(self) -> str:
        cpus, gpus = (sum(node.get(kind, 0.0) for node in self.facts.nodes) for kind in ("CPU", "GPU"))
        return f"{len(self.facts.nodes)} nodes, {cpus:g} CPUs, {gpus:g} GPUs"

    def _actors(self) -> str:
        plan, measured = self.facts.actors, self.calibration
        size = f"{plan.num_actors}" + (f" to {plan.max_actors}" if plan.max_actors > plan.num_actors else "")
        on = f"{plan.gpus_per_actor:g} GPU" if plan.device == "cuda" else f"{plan.cpus_per_actor:g} CPUs"
        of_gpu = f", {_gb(measured.gpu_bytes)} of the GPU" if measured.gpu_bytes else ""
        return (
            f"{size} with {on} each, {plan.dtype}, batches of {self.facts.batch_size}; "
            f"{_gb(measured.actor_bytes)} of memory each{of_gpu}"
        )

    def _index(self) -> str:
        index = self.facts.index
        if index is None:
            return "none: captions without retrieval"
        return f"{index.index_id}, {index.ntotal:,} captions, {_gb(index.bytes)} on every node, shared by its actors"

    def _throughput(self) -> str:
        if self.bottleneck == "load":
            why = f"loading is the bottleneck, and {self.cpus_to_feed:,.1f} CPUs for it would keep the actors busy"
        else:
            why = "captioning is the bottleneck"
        return (
            f"{self.load_rate:,.1f} images/s loaded by {self.load_tasks} tasks, {self.caption_rate:,.1f} captioned by "
            f"{self.facts.actors.num_actors} actors: {why}"
        )

    def _time(self) -> str:
        start = f"{describe_duration(self.calibration.start_s)} for starting"
        if self.seconds is None:
            return f"{describe_duration(_MILLION / self.rate)} per million images, and {start}"
        return f"{describe_duration(self.seconds)}, of which {start}"

    def _cost(self) -> str:
        price = self.facts.gpu_hour_cost
        if self.facts.actors.device != "cuda":
            return "" if price is None else "the price of GPU-hours is not used: this plan has no GPU"
        hours = f"{self.gpu_hours_per_million:,.2f} GPU-hours per million images"
        if self.gpu_hours is not None:
            hours = f"{self.gpu_hours:,.2f} GPU-hours, {hours}"
        if self.cost_per_million is None:
            return hours
        money = f"${self.cost_per_million:,.2f} per million images"
        return f"{hours}; " + (money if self.cost is None else f"${self.cost:,.2f}, {money}")


def plan_run(facts: RunFacts, calibration: Calibration) -> RunPlan:
    """Computes what a run will take.

    Loading and captioning go on at the same time, so the slower one decides. The network is taken to serve all tasks as
    it served the one that was measured.
    """
    actors = facts.actors
    cpus = sum(node.get("CPU", 0.0) for node in facts.nodes) - actors.num_actors * actors.cpus_per_actor
    load_tasks = max(1, int(cpus))
    load_rate = load_tasks / calibration.load_s
    caption_rate = actors.num_actors / calibration.caption_s
    rate = min(load_rate, caption_rate)
    gpus = actors.num_actors * actors.gpus_per_actor
    seconds = None if facts.images is None else calibration.start_s + facts.images / rate
    gpu_hours = None if seconds is None else gpus * seconds / 3600
    per_million = gpus * _MILLION / rate / 3600
    price = facts.gpu_hour_cost if gpus else None
    return RunPlan(
        facts=facts,
        calibration=calibration,
        load_tasks=load_tasks,
        load_rate=load_rate,
        caption_rate=caption_rate,
        bottleneck="load" if load_rate < caption_rate else "caption",
        cpus_to_feed=caption_rate * calibration.load_s,
        seconds=seconds,
        gpu_hours=gpu_hours,
        gpu_hours_per_million=per_million,
        cost=None if price is None or gpu_hours is None else price * gpu_hours,
        cost_per_million=None if price is None else price * per_million,
    )


def calibrate(
    load: Callable[[], Iterable[tuple[int, Loaded]]],
    make_captioner: Callable[[], Callable[[Loaded], Any]],
    plan: ActorPlan,
) -> Calibration:
    """Loads a few batches in a CPU task and captions them in an actor of the plan's resources; connect to Ray first.

    Args:
        load: Picklable; yields (images, batch) as the run's load tasks make them, of about the run's batch size. Only
            the first four are taken. One batch is enough, but then its time includes what only the first one takes.
        make_captioner: Picklable; loads the actor's captioner, which takes such batches.
        plan: The run's actors.

    Raises:
        SmallCapError: What loading or captioning raised, wrapped in Ray's own; see `jobs.cluster.session.own_errors`.
    """
    import ray

    loading = ray.remote(num_cpus=1)(_load).remote(load)
    actor = ray.remote(_CalibratingActor).options(num_cpus=plan.cpus_per_actor, num_gpus=plan.gpus_per_actor).remote()
    try:
        batches, load_s = ray.get(loading)
        calibration: Calibration = ray.get(actor.measure.remote(make_captioner, batches, load_s))
        return calibration
    finally:
        ray.kill(actor)


def _load(load: Callable[[], Iterable[tuple[int, Loaded]]]) -> tuple[list[tuple[int, Loaded]], float]:
    """Returns some batches, and the seconds per image of all but the first."""
    timed = list(_timed(islice(load(), 1 + _TIMED_BATCHES)))
    counted = timed[1:] or timed
    seconds = sum(seconds for seconds, _ in counted) / max(1, sum(images for _, (images, _) in counted))
    return [batch for _, batch in timed], seconds


def _timed(items: Iterator[Loaded]) -> Iterator[tuple[float, Loaded]]:
    while True:
        started = time.perf_counter()
        try:
            item = next(items)
        except StopIteration:
            return
        yield time.perf_counter() - started, item


class _CalibratingActor:
    def measure(
        self, make_captioner: Callable[[], Callable[[Any], Any]], batches: list[tuple[int, Any]], load_s: float
    ) -> Calibration:
        """Captions the first batch to warm up, and the others by the clock."""
        started = time.perf_counter()
        captioner = make_captioner()
        first_images, first = batches[0]
        captioning = time.perf_counter()
        captioner(first)
        warm = time.perf_counter()
        rest = batches[1:]
        for _, batch in rest:
            captioner(batch)
        seconds = time.perf_counter() - warm if rest else warm - captioning
        images = sum(count for count, _ in rest) if rest else first_images
        return Calibration(
            images=images,
            load_s=load_s,
            caption_s=seconds / max(1, images),
            start_s=warm - started,
            actor_bytes=private_bytes(),
            gpu_bytes=_gpu_bytes(),
        )


def _gpu_bytes() -> int:
    import torch

    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0


def _gb(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
