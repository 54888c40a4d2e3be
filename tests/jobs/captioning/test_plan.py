"""A plan's arithmetic, and a dry run."""

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.captioning.calibration import Calibration
from jobs.captioning.layout import CaptionLayout
from jobs.captioning.plan import IndexFacts, RunPlan, dry_run
from smallcap.config import CaptionConfig
from smallcap.errors import ConfigError
from smallcap.index.retriever import Retriever
from smallcap.machine.actor_plan import ActorPlan
from smallcap.output.part_files import PartOptions
from tests.caption_runs import config_for, write_images

FAST = Calibration(images=768, load_s=0.004, caption_s=0.001, start_s=30.0, actor_bytes=2 * 10**9, gpu_bytes=5 * 10**9)
ON_GPU = CaptionLayout(
    nodes=({"CPU": 8.0}, {"CPU": 8.0, "GPU": 1.0}),
    actors=ActorPlan("cuda", "bfloat16", 1, 0.0, 1.0, 1),
    batch_size=256,
    rows_per_part=50_000,
    parts=PartOptions(),
)
ON_CPU = replace(ON_GPU, actors=ActorPlan("cpu", "float32", 3, 4.0, 0.0, 3), nodes=({"CPU": 16.0},))
GPU = RunPlan(
    images=1_000_000,
    fragments=3907,
    tars=0,
    done=0,
    duplicates=12,
    layout=ON_GPU,
    index=IndexFacts("v-123", 2_000_000, 2_100_000_000),
    measured=FAST,
    gpu_hour_cost=2.0,
)
CPU = replace(GPU, layout=ON_CPU)


def test_the_slower_stage_decides() -> None:
    assert (ON_GPU.load_tasks, GPU.load_rate, GPU.caption_rate) == (16, 4000, 1000)
    assert (GPU.bottleneck, GPU.rate) == ("caption", 1000)
    assert GPU.seconds == pytest.approx(1030)
    slow = replace(GPU, measured=replace(FAST, load_s=0.04))
    assert (slow.bottleneck, slow.rate, slow.cpus_to_feed) == ("load", 400, 40)
    assert "with 40.0 CPUs it would keep the actors busy" in "\n".join(slow.lines())


def test_where_ray_counts_more_cpus_than_cores_both_stages_share_them() -> None:
    measured = Calibration(768, 0.004, 0.004, 20.0, 10**9, load_cpu_s=0.003, caption_cpu_s=0.007, cores_per_cpu=0.5)
    two_cores = replace(ON_CPU, actors=ActorPlan("cpu", "float32", 1, 3.0, 0.0, 1), nodes=({"CPU": 4.0},))
    plan = replace(CPU, layout=two_cores, measured=measured, images=10_000, fragments=40)
    assert (plan.load_rate, plan.caption_rate, plan.shared_rate) == (250, 250, pytest.approx(200))
    assert plan.seconds == pytest.approx(20 + 10_000 / 200)
    assert "both share the cores, which do 200.0" in "\n".join(plan.lines())


def test_what_comes_before_the_first_captions_counts_and_so_do_they() -> None:
    measured = replace(FAST, start_s=10.0, loaded_images=256, captioned_images=64)
    plan = replace(CPU, measured=measured, before_s=5.0, images=48, fragments=1)
    assert plan.seconds == pytest.approx(15)
    assert "Time:        15 s, including 15 s to start" in plan.lines()
    few = replace(plan, images=600, fragments=2)  # two tasks load
    assert few.seconds == pytest.approx(15 + max(344 * 0.004 / 2, 536 * 0.001 / 3))


def test_gpu_hours_and_cost() -> None:
    assert GPU.gpu_hours == pytest.approx(1030 / 3600)
    assert GPU.cost(GPU.gpu_hours) == pytest.approx(2 * 1030 / 3600)
    assert GPU.cost(GPU.gpu_hours_per_million) == pytest.approx(2 * 1000 / 3600)
    assert "0.29 GPU-hours, 0.28 GPU-hours per million images; $0.57, $0.56 per million images" in GPU.lines()[-1]
    free = replace(GPU, gpu_hour_cost=None)
    assert free.cost(free.gpu_hours_per_million) is None
    assert "$" not in "\n".join(free.lines())


def test_a_plan_of_cpus_has_no_gpu_hours_and_says_that_the_price_is_not_used() -> None:
    assert ON_CPU.load_tasks == 4  # 16 CPUs, of which the actors have 12
    assert (CPU.gpu_hours, CPU.cost(CPU.gpu_hours)) == (0, None)
    assert CPU.lines()[-1] == "Cost:        the price of GPU-hours is not used: this plan has no GPU"
    assert not any(line.startswith("Cost") for line in replace(CPU, gpu_hour_cost=None).lines())


def test_tars_leave_the_number_open_but_not_the_rate() -> None:
    plan = replace(GPU, images=None, fragments=20, tars=20)
    assert (plan.seconds, plan.gpu_hours, plan.cost(plan.gpu_hours)) == (None, None, None)
    text = "\n".join(plan.lines())
    assert "unknown until tars are read, in 20 fragments, 20 of them tars" in text
    assert "16 min 40 s per million images" in text
    assert "0.28 GPU-hours per million images; $0.56 per million images" in text


def test_a_pool_that_may_grow_says_what_it_then_does() -> None:
    plan = replace(GPU, layout=replace(ON_GPU, actors=replace(ON_GPU.actors, max_actors=8)))
    (line,) = (line for line in plan.lines() if line.startswith("At most"))
    assert "8 actors caption 8,000.0 images/s, with 4.0 CPUs for loading per actor" in line


def test_people_read_what_is_known() -> None:
    text = "\n".join(GPU.lines())
    assert "1,000,000 to do in 3,907 fragments; 0 done before, 12 duplicates left out" in text
    assert "2 nodes, 16 CPUs, 1 GPU\n" in text
    assert "2,000,000 captions, 2.1 GB on every node, shared by its actors" in text
    assert "2.0 GB of memory and 5.0 GB of GPU memory each" in text
    assert "captions are made without retrieval" in "\n".join(replace(GPU, index=None).lines())


def test_nodes_without_gpus_feed_those_that_have_them() -> None:
    beside = replace(ON_GPU, actors=replace(ON_GPU.actors, cpus_per_actor=2.0))
    assert (beside.load_tasks, beside.load_cpus, beside.load_cpus_elsewhere) == (14, 14, 8)
    plan = replace(GPU, layout=beside)
    assert (plan.load_rate, plan.cpus_per_gpu) == (3500, 4)
    assert (
        "Loading:     one GPU is fed by 4.0 CPUs; 14.0 are there for all, of them 8.0 on nodes without a GPU, "
        "with 2,000.0 images/s"
    ) in plan.lines()
    alone = replace(GPU, layout=replace(beside, nodes=({"CPU": 8.0, "GPU": 1.0},)))
    assert "Loading:     one GPU is fed by 4.0 CPUs; 6.0 are there for all" in alone.lines()
    assert (CPU.cpus_per_gpu, ON_CPU.load_cpus_elsewhere) == (None, 0)
    assert not any(line.startswith("Loading") for line in CPU.lines())


def test_tasks_that_share_a_cpu_load_what_that_cpu_does() -> None:
    small = replace(
        ON_GPU,
        nodes=({"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0}),
        actors=replace(ON_GPU.actors, cpus_per_actor=0.25, cpus_per_task=0.5),
    )
    assert (small.load_tasks, small.load_cpus) == (3, 1.5)
    assert replace(GPU, layout=small).load_rate == 375


@pytest.mark.parametrize(("gpus", "share"), [(0.25, 0.25), (0.3, 0.3), (1.0, 1.0), (2.0, 1.0), (0.0, 1.0)])
def test_an_actor_keeps_to_its_share_of_a_gpu(gpus: float, share: float) -> None:
    assert replace(ON_GPU, actors=replace(ON_GPU.actors, gpus_per_actor=gpus)).gpu_share == share


def test_actors_on_cpus_share_the_memory_of_the_node_that_holds_most() -> None:
    assert ON_GPU.actors_on_node == 1
    assert ON_CPU.actors_on_node == 3
    spread = replace(ON_CPU, nodes=({"CPU": 8.0}, {"CPU": 4.0}, {"CPU": 0.0}))
    assert spread.actors_on_node == 2


def test_a_dry_run_captions_some_images_and_writes_nothing(index: str, tiny_smallcap: Path, tmp_path: Path) -> None:
    write_images(f"{tmp_path}/images", 9)
    config = config_for(f"{tmp_path}/images", index, tiny_smallcap, f"{tmp_path}/out", "compute.batch_size=2")
    plan = dry_run(config)
    assert plan.images == 9
    assert plan.measured.images == 3 * 2  # 8 of the 9 are loaded; a call takes a batch
    assert min(plan.measured.load_s, plan.measured.caption_s) > 0
    assert not (tmp_path / "out").exists()
    few = dry_run(config.model_copy(update={"limit": 1}))
    assert few.measured.images == 3


def test_a_dry_run_shares_an_index_that_its_run_shares(
    index: str, tiny_smallcap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(f"{tmp_path}/images", 3)
    sets = ("retrieval.partitions=2", f"retrieval.cache_dir={tmp_path}/cache")
    config = config_for(f"{tmp_path}/images", index, tiny_smallcap, f"{tmp_path}/out", *sets)
    monkeypatch.delattr(Retriever, "open")  # an actor would hold all of it
    assert dry_run(config).measured.images == 9


def test_a_dry_run_of_a_finished_run_says_so(finished_run: CaptionConfig) -> None:
    with pytest.raises(ConfigError, match="No image is left"):
        dry_run(finished_run)
