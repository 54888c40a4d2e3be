"""Lays a captioning run out on its cluster: actors, batches, and what its tasks and actors are told.

Ray is imported only when a cluster is asked for its resources; torch never is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jobs.captioning.record import RunRecord
from jobs.captioning.routes import Routes
from jobs.cluster.resources import SMALL_TASK_CPUS, node_resources
from smallcap.config import CaptionConfig
from smallcap.images.fragments import FRAGMENT_ROWS
from smallcap.images.work_list import WorkList
from smallcap.machine.actor_plan import LARGEST_BATCH, ActorPlan, actors_on, plan_actors, tasks_beside
from smallcap.machine.cpu_precision import CpuPrecision, cpu_precision
from smallcap.model.encoder_spec import load_crop_plan
from smallcap.output.coverage import WorkItem
from smallcap.output.part_files import PartOptions

if TYPE_CHECKING:
    from jobs.captioning.load import LoadSpec
    from jobs.captioning.watch import RunWatch

# On a GPU an actor prepares its next batch while it decodes one. It has two calls at a time, so that this does not end
# with a call, and Ray holds two more ready: four calls of few batches are less memory than one of many.
BATCHES_PER_CALL = {"cpu": 1, "cuda": 2}
CALLS_AT_ONCE = {"cpu": 1, "cuda": 2}
_ROWS_PER_PART = {"cpu": 5_000, "cuda": 50_000}  # a few minutes of an actor's work, which a kill can cost
_ROWS_PER_TAR = 2_000  # where the images are written as well


@dataclass(frozen=True)
class CaptionLayout:
    """How a run is laid out on its cluster."""

    nodes: tuple[dict[str, float], ...]  # each node's resources, as Ray counts them
    actors: ActorPlan
    batch_size: int  # the most images that go through the model together
    rows_per_part: int
    parts: PartOptions
    precision: str = ""  # and why it was chosen, for people; empty where it was asked for, or GPUs are asked later

    @property
    def images_per_call(self) -> int:
        """The number of images that an actor is given at a time."""
        return self.batch_size * BATCHES_PER_CALL[self.actors.device]

    @property
    def calls_at_once(self) -> int:
        """The number of calls that go on in an actor at the same time."""
        return CALLS_AT_ONCE[self.actors.device]

    @property
    def images_per_block(self) -> int:
        """The most loaded images in a block; Ray counts in blocks what waits for the actors."""
        return max(FRAGMENT_ROWS, self.images_per_call)

    @property
    def load_tasks(self) -> int:
        """The number of loading tasks that run next to the actors."""
        most, fitting = self.actors.load_tasks, sum(tasks_beside(self.actors, self.nodes))
        return max(1, fitting if most is None else min(fitting, most))

    @property
    def load_cpus(self) -> float:
        """The CPUs that all loading tasks use; on CPUs each has a core, which it shares with an actor."""
        return self.load_tasks * (self.actors.cpus_per_task if self.actors.device == "cuda" else 1.0)

    @property
    def load_cpus_elsewhere(self) -> float:
        """Those of them that are on nodes without a GPU, where the others have one."""
        tasks = tasks_beside(self.actors, self.nodes)
        elsewhere = sum(count for count, node in zip(tasks, self.nodes, strict=True) if not node.get("GPU"))
        return elsewhere * self.actors.cpus_per_task if self.actors.device == "cuda" else 0.0

    @property
    def gpu_share(self) -> float:
        """The share of a GPU's memory that an actor keeps to; 1 without a GPU as well."""
        return min(1.0, self.actors.gpus_per_actor) or 1.0

    @property
    def actors_on_node(self) -> int:
        """The most actors that share the memory of a node; 1 with GPUs, whose memory is what counts."""
        if self.actors.device == "cuda":
            return 1
        most = max(actors_on(node, self.actors.cpus_per_actor, 0) for node in self.nodes)
        return max(1, min(most, self.actors.max_actors))


def lay_out(config: CaptionConfig, record: RunRecord) -> CaptionLayout:
    """Lays a run out on the cluster that this process is connected to."""
    nodes = tuple(node_resources())
    actors, precision = plan_actors(config.compute, nodes), ""
    if actors.device == "cpu" and config.compute.dtype == "auto":
        dtype, precision = _cpu_precision(config, record)
        actors = replace(actors, dtype=dtype)
    output, batch_size = config.output, config.compute.batch_size
    with_tars = "webdataset" in output.write
    automatic_rows = _ROWS_PER_TAR if with_tars else _ROWS_PER_PART[actors.device]
    return CaptionLayout(
        nodes,
        actors,
        LARGEST_BATCH[actors.device] if batch_size == "auto" else batch_size,
        automatic_rows if output.rows_per_part == "auto" else output.rows_per_part,
        PartOptions(output.rows_per_row_group, output.save_embeddings, with_tars),
        precision,
    )


def _cpu_precision(config: CaptionConfig, record: RunRecord) -> tuple[str, str]:
    """Returns what `auto` means on CPU, with the reason: the precision of earlier attempts, or else the fastest.

    A node says which that is. A run has one precision, also on nodes of several kinds.
    """
    import ray

    earlier = [attempt.dtype for attempt in record.attempts if attempt.device == "cpu" and attempt.dtype]
    if earlier:
        return earlier[0], f"{earlier[0]}, as when the run began"
    measure = ray.remote(cpu_precision).options(num_cpus=SMALL_TASK_CPUS)
    found: CpuPrecision = ray.get(measure.remote(config.retrieval.cache_dir))
    return found.dtype, found.describe()


def load_spec(
    config: CaptionConfig, record: RunRecord, work: WorkList, layout: CaptionLayout, watch: RunWatch
) -> LoadSpec:
    """Returns what loading tasks are told."""
    from jobs.captioning.load import LoadSpec

    crops = load_crop_plan(config.model, record.retrieval_encoder, config.input.decode, config.retrieval.cache_dir)
    keep_bytes = layout.parts.webdataset
    return LoadSpec(
        crops,
        config.input,
        work.kept_columns,
        keep_bytes,
        watch.monitor,
        watch.crash_guard,
        keys=config.generation.do_sample,
        routes=Routes.of(config),
    )


def count_images(items: Sequence[WorkItem]) -> int | None:
    """Returns how many images there are to do; None where a tar has not been counted."""
    if any(item.fragment.rows is None for item in items):
        return None
    return sum((item.fragment.rows or 0) if item.wanted is None else len(item.wanted) for item in items)
