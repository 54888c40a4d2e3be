"""A plan's arithmetic, and the calibration that it rests on."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest

from jobs.captioning.dry_run import Calibration, IndexFacts, RunFacts, calibrate, plan_run
from jobs.cluster.session import own_errors
from smallcap.errors import CheckpointError
from smallcap.machine.actor_plan import ActorPlan

GPU = RunFacts(
    images=1_000_000,
    fragments=3907,
    tars=0,
    done=0,
    duplicates=12,
    nodes=({"CPU": 8.0}, {"CPU": 8.0, "GPU": 1.0}),
    actors=ActorPlan("cuda", "bfloat16", 1, 0.0, 1.0, 1),
    batch_size=256,
    index=IndexFacts("v-123", 2_000_000, 2_100_000_000),
    gpu_hour_cost=2.0,
)
CPU = replace(GPU, actors=ActorPlan("cpu", "float32", 3, 4.0, 0.0, 3), nodes=({"CPU": 16.0},))
FAST = Calibration(images=768, load_s=0.004, caption_s=0.001, start_s=30.0, actor_bytes=2 * 10**9, gpu_bytes=5 * 10**9)


def test_the_slower_stage_decides() -> None:
    plan = plan_run(GPU, FAST)
    assert (plan.load_tasks, plan.load_rate, plan.caption_rate) == (16, 4000, 1000)
    assert (plan.bottleneck, plan.rate) == ("caption", 1000)
    assert plan.seconds == pytest.approx(1030)
    slow = plan_run(GPU, replace(FAST, load_s=0.04))
    assert (slow.bottleneck, slow.rate, slow.cpus_to_feed) == ("load", 400, 40)
    assert "40.0 CPUs for it would keep the actors busy" in "\n".join(slow.lines())


def test_gpu_hours_and_cost() -> None:
    plan = plan_run(GPU, FAST)
    assert plan.gpu_hours == pytest.approx(1030 / 3600)
    assert plan.cost == pytest.approx(2 * 1030 / 3600)
    assert plan.cost_per_million == pytest.approx(2 * 1000 / 3600)
    assert "0.29 GPU-hours, 0.28 GPU-hours per million images; $0.57, $0.56 per million images" in plan.lines()[-1]
    free = plan_run(replace(GPU, gpu_hour_cost=None), FAST)
    assert (free.cost, free.cost_per_million) == (None, None)
    assert "$" not in "\n".join(free.lines())


def test_a_plan_of_cpus_has_no_gpu_hours_and_says_that_the_price_is_not_used() -> None:
    plan = plan_run(CPU, FAST)
    assert plan.load_tasks == 4  # 16 CPUs, of which the actors have 12
    assert (plan.gpu_hours, plan.cost, plan.cost_per_million) == (0, None, None)
    assert plan.lines()[-1] == "Cost:        the price of GPU-hours is not used: this plan has no GPU"
    assert not any(line.startswith("Cost") for line in plan_run(replace(CPU, gpu_hour_cost=None), FAST).lines())


def test_tars_leave_the_number_open_but_not_the_rate() -> None:
    plan = plan_run(replace(GPU, images=None, fragments=20, tars=20), FAST)
    assert (plan.seconds, plan.gpu_hours, plan.cost) == (None, None, None)
    text = "\n".join(plan.lines())
    assert "a number that is known once tars are read, in 20 fragments, 20 of them tars" in text
    assert "16 min 40 s per million images" in text
    assert "0.28 GPU-hours per million images; $0.56 per million images" in text


def test_a_pool_that_may_grow_says_what_it_then_does() -> None:
    plan = plan_run(replace(GPU, actors=replace(GPU.actors, max_actors=8)), FAST)
    (line,) = (line for line in plan.lines() if line.startswith("Grown"))
    assert "8 actors caption 8,000.0 images/s, with 4.0 CPUs for loading to each" in line


def test_people_and_programs_read_the_same() -> None:
    plan = plan_run(GPU, FAST)
    values = json.loads(plan.to_json())
    assert values["rate"] == 1000
    assert values["facts"]["actors"]["num_actors"] == 1
    assert values["facts"]["index"]["ntotal"] == 2_000_000
    text = "\n".join(plan.lines())
    assert "1,000,000 to do in 3,907 fragments; 0 done before, 12 duplicates left out" in text
    assert "2,000,000 captions, 2.1 GB on every node, shared by its actors" in text
    assert "2.0 GB of memory each, 5.0 GB of the GPU" in text
    assert "captions without retrieval" in "\n".join(plan_run(replace(GPU, index=None), FAST).lines())


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

    with pytest.raises(CheckpointError), own_errors():
        calibrate(lambda: [(1, 0)], fail, ActorPlan("cpu", "float32", 1, 1.0, 0.0, 1))
