"""`--dry-run`: estimates what a captioning run will take, from the cluster, the work and a few captioned batches."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import pyarrow as pa

from jobs.captioning.calibration import Calibration, calibrate, time_loading
from jobs.captioning.layout import CaptionLayout, count_images, lay_out, load_spec
from jobs.captioning.record import RunRecord
from jobs.captioning.watch import watch_run
from jobs.captioning.work import list_work, open_record, remaining_items
from jobs.cluster.addresses import check_address
from jobs.cluster.errors import unwrapped_errors
from jobs.cluster.pinned import check_indexes_are_there
from jobs.cluster.session import on_ray
from jobs.cluster.stopping import StopSignals, stoppable
from smallcap import storage
from smallcap.config import CaptionConfig
from smallcap.errors import ConfigError
from smallcap.images.fragments import InputBatch
from smallcap.images.listing import make_work_list
from smallcap.images.row_ranges import RowRanges
from smallcap.images.work_list import WorkList, read_fragment
from smallcap.index.manifest import load_manifests
from smallcap.output.coverage import Coverage, WorkItem, work_left
from smallcap.phrasing import describe_count, describe_duration, describe_gb

if TYPE_CHECKING:
    from jobs.captioning.load import LoadSpec

_SAMPLE_BATCHES = 4  # of images that are loaded
_MILLION = 1_000_000


@dataclass(frozen=True)
class IndexFacts:
    """The index of a run, or all of them."""

    index_id: str
    ntotal: int  # captions
    bytes: int  # of its files: on disk in every node's cache, and in memory that the node's actors share


@dataclass(frozen=True)
class RunPlan:
    """What is known of a run before it starts, and the time, cost and bottleneck that follow from it.

    Loading and captioning go on at the same time, so the slower one decides, or the cores that both share where Ray
    counts more CPUs than there are. The plan assumes that the network serves all tasks as well as the one that was
    measured.
    """

    images: int | None  # to do; None where there are uncounted tars
    fragments: int  # to do
    tars: int  # how many of the fragments are tars
    done: int  # rows in the output
    duplicates: int  # images left out of the list
    layout: CaptionLayout
    index: IndexFacts | None
    measured: Calibration
    gpu_hour_cost: float | None = None  # $
    before_s: float = 0.0  # what came before the measurement, and comes before a run's first image: listing, Ray

    @property
    def load_rate(self) -> float:
        """Images/s of all loading tasks together."""
        return self.layout.load_cpus / self.measured.load_s

    @property
    def caption_rate(self) -> float:
        """Images/s of all actors with which the run starts."""
        return self.layout.actors.num_actors / self.measured.caption_s

    @property
    def shared_rate(self) -> float:
        """Images/s that the cores of all nodes load and caption together."""
        cores = sum(node.get("CPU", 0.0) for node in self.layout.nodes) * self.measured.cores_per_cpu
        return cores / max(self.measured.load_cpu_s + self.measured.caption_cpu_s, 1e-9)

    @property
    def rate(self) -> float:
        """Images/s of the run."""
        return min(self.load_rate, self.caption_rate, self.shared_rate)

    @property
    def bottleneck(self) -> Literal["load", "caption"]:
        """The slower stage."""
        return "load" if self.load_rate < self.caption_rate else "caption"

    @property
    def cpus_to_feed(self) -> float:
        """The number of CPUs for loading that keeps these actors busy."""
        return self.caption_rate * self.measured.load_s

    @property
    def cpus_per_gpu(self) -> float | None:
        """The number of CPUs for loading that keeps one GPU busy; None on CPUs."""
        return self.cpus_to_feed / self._gpus if self._gpus else None

    @property
    def seconds(self) -> float | None:
        """Seconds that the whole run takes; None where the number of images is unknown.

        What is loaded and captioned at the end of the start is counted there. A fragment is loaded by one task.
        """
        if self.images is None:
            return None
        measured, tasks = self.measured, min(self.layout.load_tasks, self.fragments)
        load_s = max(0, self.images - measured.loaded_images) / self.load_rate * self.layout.load_tasks / tasks
        rest = max(0, self.images - measured.captioned_images)
        return self.start_s + max(load_s, rest / min(self.caption_rate, self.shared_rate))

    @property
    def start_s(self) -> float:
        """Seconds from the command to the first captions."""
        return self.before_s + self.measured.start_s

    @property
    def gpu_hours(self) -> float | None:
        """GPU-hours of the whole run, 0 on CPUs; None where the number of images is unknown."""
        return None if self.seconds is None else self._gpus * self.seconds / 3600

    @property
    def gpu_hours_per_million(self) -> float:
        """GPU-hours of a million images, without the time to start."""
        return self._gpus * _MILLION / self.rate / 3600

    @property
    def _gpus(self) -> float:
        return self.layout.actors.num_actors * self.layout.actors.gpus_per_actor

    def cost(self, gpu_hours: float | None) -> float | None:
        """Returns the cost of GPU-hours in $; None without a price, or on CPUs."""
        if self.gpu_hour_cost is None or gpu_hours is None or not self._gpus:
            return None
        return self.gpu_hour_cost * gpu_hours

    def lines(self) -> list[str]:
        """Returns the plan as lines for people."""
        actors, measured = self.layout.actors, self.measured
        named = [
            ("Images", self._images()),
            ("Cluster", self._cluster()),
            ("Actors", self._actors()),
            ("Precision", self.layout.precision),
            ("Index", self._index()),
            (
                "Measured",
                f"{measured.load_s * 1000:,.2f} ms per image on one CPU, {measured.caption_s * 1000:,.2f} ms in "
                f"one actor, over {measured.images:,} images",
            ),
            ("Throughput", self._throughput()),
            ("Loading", self._loading()),
            ("Time", self._time()),
            ("Cost", self._cost()),
        ]
        if actors.max_actors > actors.num_actors:
            grown = actors.max_actors / measured.caption_s
            needed = f"{self.cpus_to_feed / actors.num_actors:,.1f} CPUs for loading per actor"
            named.insert(8, ("At most", f"{actors.max_actors} actors caption {grown:,.1f} images/s, with {needed}"))
        return [f"{name + ':':12} {text}" for name, text in named if text]

    def _images(self) -> str:
        number = f"{self.images:,} to do" if self.images is not None else "unknown until tars are read,"
        tars = f", {self.tars:,} of them tars" if self.tars else ""
        others = f"{self.done:,} done before, {describe_count(self.duplicates, 'duplicate')} left out"
        return f"{number} in {describe_count(self.fragments, 'fragment')}{tars}; {others}"

    def _cluster(self) -> str:
        cpus, gpus = (sum(node.get(kind, 0.0) for node in self.layout.nodes) for kind in ("CPU", "GPU"))
        counts = ((len(self.layout.nodes), "node"), (cpus, "CPU"), (gpus, "GPU"))
        return ", ".join(describe_count(count, noun) for count, noun in counts)

    def _actors(self) -> str:
        plan, measured = self.layout.actors, self.measured
        size = f"{plan.num_actors}" + (f" to {plan.max_actors}" if plan.max_actors > plan.num_actors else "")
        on_gpu = plan.device == "cuda"
        device = describe_count(plan.threads, "thread")
        if on_gpu:
            kind = f" ({plan.accelerator_type})" if plan.accelerator_type else ""
            cpus = describe_count(plan.cpus_per_actor, "CPU")
            device = f"{describe_count(plan.gpus_per_actor, 'GPU')}{kind} and {cpus}"
        gpu = f" and {describe_gb(measured.gpu_bytes)} of GPU memory" if measured.gpu_bytes else ""
        return (
            f"{size} with {device} each, {plan.dtype}, batches of {self.layout.batch_size}; "
            f"{describe_gb(measured.actor_bytes)} of memory{gpu} each"
        )

    def _index(self) -> str:
        index = self.index
        if index is None:
            return "none; captions are made without retrieval"
        size = describe_gb(index.bytes)
        return f"{index.index_id}, {index.ntotal:,} captions, {size} on every node, shared by its actors"

    def _throughput(self) -> str:
        if self.shared_rate < min(self.load_rate, self.caption_rate):
            verdict = f"both share the cores, which do {self.shared_rate:,.1f}"
        elif self.bottleneck == "load":
            verdict = f"loading is the bottleneck; with {self.cpus_to_feed:,.1f} CPUs it would keep the actors busy"
        else:
            verdict = "captioning is the bottleneck"
        tasks = describe_count(self.layout.load_tasks, "task")
        actors = describe_count(self.layout.actors.num_actors, "actor")
        return (
            f"{self.load_rate:,.1f} images/s loaded by {tasks}, {self.caption_rate:,.1f} captioned by {actors}: "
            f"{verdict}"
        )

    def _loading(self) -> str:
        """Says what feeds the GPUs; empty on CPUs."""
        if self.cpus_per_gpu is None:
            return ""
        elsewhere = self.layout.load_cpus_elsewhere
        rate = elsewhere / self.measured.load_s
        beside = f", of them {elsewhere:,.1f} on nodes without a GPU, with {rate:,.1f} images/s" if elsewhere else ""
        return (
            f"one GPU is fed by {self.cpus_per_gpu:,.1f} CPUs; {self.layout.load_cpus:,.1f} are there for all{beside}"
        )

    def _time(self) -> str:
        start = f"{describe_duration(self.start_s)} to start"
        if self.seconds is None:
            return f"{describe_duration(_MILLION / self.rate)} per million images, plus {start}"
        return f"{describe_duration(self.seconds)}, including {start}"

    def _cost(self) -> str:
        price = self.gpu_hour_cost
        if self.layout.actors.device != "cuda":
            return "" if price is None else "the price of GPU-hours is not used: this plan has no GPU"
        hours = f"{self.gpu_hours_per_million:,.2f} GPU-hours per million images"
        if self.gpu_hours is not None:
            hours = f"{self.gpu_hours:,.2f} GPU-hours, {hours}"
        per_million, cost = self.cost(self.gpu_hours_per_million), self.cost(self.gpu_hours)
        if per_million is None:
            return hours
        money = f"${per_million:,.2f} per million images"
        return f"{hours}; " + (money if cost is None else f"${cost:,.2f}, {money}")


def dry_run(config: CaptionConfig, address: str | None = None, gpu_hour_cost: float | None = None) -> RunPlan:
    """Lists the input, captions a few batches, and estimates what the run will take; writes nothing to its output.

    Args:
        config: The run's config.
        address: Address of a Ray cluster; see `jobs.cluster.session.connect` for the default.
        gpu_hour_cost: Cost of one GPU for an hour, in $.

    Raises:
        ConfigError: The options are wrong, or the output holds a run with other options.
        RunError: Storage, index or checkpoint cannot be used.
        Stopped: A signal came.
    """
    with stoppable("a dry run writes nothing") as signals:
        return _dry_run(config, address, gpu_hour_cost, signals)


def _dry_run(config: CaptionConfig, address: str | None, gpu_hour_cost: float | None, signals: StopSignals) -> RunPlan:
    """Makes a plan; see `dry_run`."""
    began = time.perf_counter()
    record = open_record(config)
    check_indexes_are_there(record, config.index)
    check_address(address)  # before what may take long
    with storage.scratch_folder() as scratch:
        if record.input is None:  # the run has not begun
            work = make_work_list(config.images, config.input, str(scratch), config.columns_to_keep)
            items = list(work_left(work.fragments, Coverage([]), config.limit, _assume_all))
        else:
            work = list_work(config, record)
            items = remaining_items(config, work, settled=False)
        with on_ray(address, lambda: "A dry run writes nothing."):  # before Ray Data, which reads its settings
            from jobs.captioning.caption import CaptionerSpec, CaptionImages
            from jobs.captioning.load import start_loading
            from jobs.captioning.retrieval_actors import shared_indexes

            signals.arm()
            layout = lay_out(config, record)
            sample = _sample(config, work, items, layout.batch_size)
            number = sum(len(images.rows) for _, images in sample)
            is_all = number < _SAMPLE_BATCHES * layout.batch_size
            with (
                unwrapped_errors(),
                watch_run(record.run_id, None, None) as watch,
                shared_indexes(config, record.index_id) as partitions,
            ):
                loading = load_spec(config, record, work, layout, watch)
                captioning = CaptionerSpec(
                    config, layout, record.index_id, record.retrieval_encoder, watch.monitor, partitions
                )
                images = start_loading([sample], _load_sample, loading, number, layout.actors)
                before_s = time.perf_counter() - began
                measured = calibrate(
                    images,
                    number,
                    partial(CaptionImages, captioning),
                    layout.actors,
                    min(number, layout.images_per_call) if is_all else layout.images_per_call,
                    layout.calls_at_once,
                    watch.fault_guard,
                )
    return RunPlan(
        images=count_images(items),
        fragments=len(items),
        tars=sum(item.fragment.kind == "tar" for item in items),
        done=record.images.total,
        duplicates=work.duplicates,
        layout=layout,
        index=_index_facts(config, record),
        measured=measured,
        gpu_hour_cost=gpu_hour_cost,
        before_s=before_s,
    )


def _assume_all(fragment: object, most: int) -> int:
    """Stands in for counting a tar's images: a plan does not read tars for that."""
    return most


def _index_facts(config: CaptionConfig, record: RunRecord) -> IndexFacts | None:
    if record.index_id is None:
        return None
    manifests = load_manifests(config.index, record.index_id)
    size = sum(entry.bytes for manifest in manifests for entry in manifest.files)
    return IndexFacts(record.index_id, sum(manifest.ntotal for manifest in manifests), size)


def _sample(
    config: CaptionConfig, work: WorkList, items: Sequence[WorkItem], batch_size: int
) -> list[tuple[int, InputBatch]]:
    """Returns the first images to do, in several batches, with the number of their fragment.

    Raises:
        ConfigError: There are none.
    """
    sample: list[tuple[int, InputBatch]] = []
    left = _SAMPLE_BATCHES * batch_size
    for item in items:
        for images in read_fragment(item.fragment, item.wanted, config.input, work.kept_columns):
            for start in range(0, len(images.rows), batch_size):
                batch = images.only(RowRanges.of(images.rows[start : min(start + batch_size, start + left)]))
                if batch is not None:
                    sample.append((item.fragment.number, batch))
                    left -= len(batch.rows)
                if not left:
                    return sample
    if not sample:
        raise ConfigError("No image is left to caption.", where=config.out)
    return sample


def _load_sample(batch: pa.Table, spec: LoadSpec) -> Iterator[pa.Table]:
    """Loads what `_sample` returns, pickled in the column `item`, as `jobs.captioning.load.load_images` does."""
    from jobs.captioning.load import load_batch

    sample = pickle.loads(batch["item"][0].as_py())  # noqa: S301 - this job's driver wrote it
    yield from time_loading(load_batch(number, images, spec) for number, images in sample)
