"""What a captioning run uses: actors, batches, what its tasks and actors are told. And `--dry-run`, which stops there.

Ray is imported when a cluster is asked for what it has, and not before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from jobs.captioning.dry_run import IndexFacts, RunFacts, RunPlan, calibrate, plan_run
from jobs.captioning.record import RunRecord
from jobs.captioning.work import list_work, open_record, what_is_left
from smallcap import storage
from smallcap.config import CaptionConfig
from smallcap.images.fragments import FRAGMENT_ROWS
from smallcap.images.row_ranges import RowRanges
from smallcap.images.work_list import InputBatch, WorkList, make_work_list, read_fragment
from smallcap.index.manifest import load_manifest
from smallcap.machine.actor_plan import ActorPlan, plan_actors
from smallcap.machine.precision import fastest_cpu_dtype
from smallcap.model.checkpoint import load_crop_plan
from smallcap.output.coverage import Coverage, WorkItem, work_left
from smallcap.output.part_files import PartOptions

if TYPE_CHECKING:
    import pyarrow as pa

    from jobs.captioning.caption import CaptionerSpec, CaptionImages
    from jobs.captioning.load import LoadSpec
    from jobs.captioning.monitor import MonitorClient

_CPU_BATCH, _GPU_BATCH = 64, 256  # images
_BATCHES_PER_CALL = {"cpu": 1, "cuda": 4}  # on a GPU an actor prepares its next batch while it decodes one
_ROWS_PER_PART = {"cpu": 5_000, "cuda": 50_000}  # some minutes of one actor's work, which is what a kill can cost
_ROWS_PER_TAR = 2_000  # where a part's images are written too
_CALIBRATION_BATCHES = 4  # the first warms up


@dataclass(frozen=True)
class CaptionPlan:
    """How a run is laid out on its cluster."""

    nodes: tuple[dict[str, float], ...]  # what each has, as Ray counts it
    actors: ActorPlan
    batch_size: int  # most images that go through the model together
    rows_per_part: int
    parts: PartOptions

    @property
    def images_per_call(self) -> int:
        """How many images an actor is given at a time."""
        return self.batch_size * _BATCHES_PER_CALL[self.actors.device]

    @property
    def images_per_block(self) -> int:
        """How many loaded images a block holds at most; what waits for the actors is counted in blocks."""
        return max(FRAGMENT_ROWS, self.images_per_call)

    @property
    def load_tasks(self) -> int:
        """How many loading tasks can run at once beside the actors."""
        cpus = sum(node.get("CPU", 0.0) for node in self.nodes) - self.actors.num_actors * self.actors.cpus_per_actor
        return max(1, int(cpus))

    @property
    def actors_on_device(self) -> int:
        """How many actors share a GPU, or where there is none, the memory of a node."""
        if self.actors.device == "cuda":
            return max(1, int(1 / self.actors.gpus_per_actor))
        return -(-self.actors.num_actors // len(self.nodes))


def plan_on_cluster(config: CaptionConfig, record: RunRecord) -> CaptionPlan:
    """Lays a run out on the cluster that this process is connected to."""
    from jobs.cluster.tasks import node_resources

    nodes = tuple(node_resources())
    actors = plan_actors(config.compute, nodes)
    if actors.device == "cpu" and config.compute.dtype == "auto":
        actors = replace(actors, dtype=_cpu_dtype(record))
    output, on_gpu = config.output, actors.device == "cuda"
    with_tars = "webdataset" in output.write
    automatic_rows = _ROWS_PER_TAR if with_tars else _ROWS_PER_PART[actors.device]
    automatic_batch = _GPU_BATCH if on_gpu else _CPU_BATCH
    return CaptionPlan(
        nodes,
        actors,
        automatic_batch if config.compute.batch_size == "auto" else config.compute.batch_size,
        automatic_rows if output.rows_per_part == "auto" else output.rows_per_part,
        PartOptions(output.rows_per_row_group, output.save_embeddings, with_tars),
    )


def _cpu_dtype(record: RunRecord) -> str:
    """Returns what `auto` means on CPU actors: what earlier attempts of the run took, else what a worker measures."""
    import ray

    earlier = [attempt.dtype for attempt in record.attempts if attempt.device == "cpu" and attempt.dtype]
    if earlier:
        return earlier[0]
    dtype: str = ray.get(ray.remote(_measure_cpu_dtype).remote())
    return dtype


def _measure_cpu_dtype() -> str:
    """Runs on a worker; Ray takes no cached function."""
    return fastest_cpu_dtype()


def load_spec(
    config: CaptionConfig, record: RunRecord, work: WorkList, plan: CaptionPlan, monitor: MonitorClient
) -> LoadSpec:
    """Returns what loading tasks are told."""
    from jobs.captioning.load import LoadSpec

    crops = load_crop_plan(config.model, record.retrieval_encoder, config.input.decode)
    return LoadSpec(crops, config.input, work.kept_columns, plan.parts.webdataset, monitor)


def captioner_spec(
    config: CaptionConfig, record: RunRecord, plan: CaptionPlan, monitor: MonitorClient
) -> CaptionerSpec:
    """Returns what captioning actors are told."""
    from jobs.captioning.caption import CaptionerSpec

    return CaptionerSpec(
        config=config,
        device=plan.actors.device,
        dtype=plan.actors.dtype,
        index_id=record.index_id,
        retrieval_encoder=record.retrieval_encoder,
        batch_size=plan.batch_size,
        actors_on_device=plan.actors_on_device,
        monitor=monitor,
    )


def count_images(items: Sequence[WorkItem]) -> int | None:
    """Returns how many images are to do; None where a tar has not said yet."""
    counts = [item.fragment.rows if item.wanted is None else len(item.wanted) for item in items]
    known = [count for count in counts if count is not None]
    unknown = any(item.fragment.rows is None for item in items)
    return None if unknown else sum(known)


def dry_run(config: CaptionConfig, address: str | None = None, gpu_hour_cost: float | None = None) -> RunPlan:
    """Lists the input, captions a few batches of it, and says what the run will take; writes nothing to its output.

    Args:
        config: The run's.
        address: Of a Ray cluster; by default the one this process belongs to, or a new local one.
        gpu_hour_cost: $ of one GPU for an hour.

    Raises:
        ConfigError: The options are wrong, or the output holds a run with others.
        RunError: Storage, index or checkpoint cannot be used.
    """
    from jobs.captioning.monitor import start_monitor
    from jobs.cluster.session import connect, own_errors

    record = open_record(config)
    with storage.scratch_folder() as scratch:
        if record.input is None:  # the run has not begun
            work = make_work_list(config.images, config.input, str(scratch), config.keep_columns)
            items = list(work_left(work.fragments, Coverage([]), config.limit, _as_asked))
        else:
            work = list_work(config, record)
            items = what_is_left(config, work)
        connect(address)
        plan = plan_on_cluster(config, record)
        sample = list(islice(_sample(config, work, items, plan.batch_size), _CALIBRATION_BATCHES))
        with own_errors(), start_monitor(None, 0, record.run_id) as monitor:
            loading = load_spec(config, record, work, plan, monitor)
            captioning = captioner_spec(config, record, plan, monitor)
            measured = calibrate(
                partial(_load_sample, sample, loading), partial(_make_captioner, captioning), plan.actors
            )
    return plan_run(_facts(record, work, items, plan, config, gpu_hour_cost), measured)


def _as_asked(fragment: object, most: int) -> int:
    """Stands for a count of a tar's images, which a plan does not read for it."""
    return most


def _facts(
    record: RunRecord,
    work: WorkList,
    items: Sequence[WorkItem],
    plan: CaptionPlan,
    config: CaptionConfig,
    gpu_hour_cost: float | None,
) -> RunFacts:
    index = None
    if record.index_id is not None:
        manifest = load_manifest(config.index or "", record.index_id)
        index = IndexFacts(manifest.index_id, manifest.ntotal, sum(entry.bytes for entry in manifest.files))
    return RunFacts(
        images=count_images(items),
        fragments=len(items),
        tars=sum(item.fragment.kind == "tar" for item in items),
        done=record.images.total,
        duplicates=work.duplicates,
        nodes=plan.nodes,
        actors=plan.actors,
        batch_size=plan.batch_size,
        index=index,
        gpu_hour_cost=gpu_hour_cost,
    )


def _sample(
    config: CaptionConfig, work: WorkList, items: Sequence[WorkItem], batch_size: int
) -> Iterator[tuple[int, InputBatch]]:
    """Yields the first images to do, with their fragment's number, in batches of at most the run's size."""
    for item in items:
        for images in read_fragment(item.fragment, item.wanted, config.input, work.kept_columns):
            for start in range(0, len(images.rows), batch_size):
                some = images.only(RowRanges.of(images.rows[start : start + batch_size]))
                if some is not None:
                    yield item.fragment.number, some


def _load_sample(sample: Sequence[tuple[int, InputBatch]], spec: LoadSpec) -> Iterator[tuple[int, pa.Table]]:
    from jobs.captioning.load import load_batch

    for number, images in sample:
        yield len(images.rows), load_batch(number, images, spec)


def _make_captioner(spec: CaptionerSpec) -> CaptionImages:
    from jobs.captioning.caption import CaptionImages

    return CaptionImages(spec)
