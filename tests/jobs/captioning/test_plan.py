"""A plan's arithmetic, and the calibration that it rests on."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest

from jobs.captioning.layout import CaptionLayout
from jobs.captioning.plan import Calibration, IndexFacts, RunPlan, calibrate
from jobs.cluster.errors import unwrapped_errors
from smallcap.errors import CheckpointError
from smallcap.machine.actor_plan import ActorPlan
from smallcap.output.part_files import PartOptions

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
    assert "40.0 CPUs for it would keep the actors busy" in "\n".join(slow.lines())


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


CLOCK = 0.0


def load(batches: int) -> Iterator[tuple[int, list[int]]]:
    global CLOCK  # noqa: PLW0603 - what is pickled finds the module's
    for number in range(batches):
        CLOCK += 2.0 if number == 0 else 0.05
        yield 10, [number] * 10


def caption(batch: list[int]) -> None:
    global CLOCK  # noqa: PLW0603
    CLOCK += 2.0 if batch[0] == 0 else 0.1


@pytest.mark.parametrize("batches", [1, 4, 9])
def test_calibration_leaves_the_first_batch_out(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.perf_counter", lambda: CLOCK)
    measured = calibrate(partial(load, batches), lambda: caption, ActorPlan("cpu", "float32", 1, 1.0, 0.0, 1))
    timed = min(batches - 1, 3)
    assert measured.images == (10 * timed or 10)
    assert measured.load_s == pytest.approx(0.005 if timed else 0.2)
    assert measured.caption_s == pytest.approx(0.01 if timed else 0.2)
    assert measured.start_s == pytest.approx(2.0)
    assert measured.actor_bytes > 1 << 20


@pytest.mark.ray
def test_an_error_of_the_captioner_arrives_as_itself() -> None:
    def fail():  # type: ignore[no-untyped-def]
        raise CheckpointError("The model is missing.")

    with pytest.raises(CheckpointError), unwrapped_errors():
        calibrate(lambda: [(1, 0)], fail, ActorPlan("cpu", "float32", 1, 1.0, 0.0, 1))
