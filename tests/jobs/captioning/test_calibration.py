"""What a dry run times: its parts by a clock that only their stand-ins move, and the whole on Ray."""

import pickle
from collections.abc import Callable, Iterator
from threading import Barrier

import pyarrow as pa
import pytest
import ray

from jobs.captioning.calibration import CalibratingActor, Calibration, calibrate, time_loading
from jobs.captioning.watch import watch_run
from jobs.cluster.errors import unwrapped_errors
from smallcap.errors import CheckpointError
from smallcap.machine.actor_plan import ActorPlan

PLAN = ActorPlan("cpu", "float32", 2, 1.0, 0.0, 1)
CLOCK = 0.0
CALLS: list[list[int]] = []


def load(batches: int) -> Iterator[pa.Table]:
    global CLOCK  # noqa: PLW0603
    for number in range(batches):
        CLOCK += 2.0 if number == 0 else 0.05
        yield pa.table({"image": range(number * 10, number * 10 + 10)})


def make_captioner() -> Callable[[pa.Table], None]:
    return caption


def caption(images: pa.Table) -> None:
    global CLOCK  # noqa: PLW0603
    assert images.column_names == ["image"]
    assert images["image"].num_chunks == 1
    CALLS.append(images["image"].to_pylist())
    CLOCK += 1.0 + (2.0 if len(CALLS) == 1 else 0.0)  # the first call records


@pytest.fixture
def by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.perf_counter", lambda: CLOCK)
    monkeypatch.setattr(CalibratingActor, "_describe", lambda actor: {"node": "here"})
    CALLS.clear()


@pytest.mark.usefixtures("by_the_clock")
@pytest.mark.parametrize(("batches", "rows"), [(1, 10), (1, 4), (4, 10), (4, 16), (4, 100)])
def test_what_happens_only_once_is_left_out(batches: int, rows: int) -> None:
    (images,) = time_loading(load(batches))
    assert len(images) == 10 * batches
    (measured,) = CalibratingActor(make_captioner, rows, 1)(images).to_pylist()
    assert measured["load_s"] == pytest.approx(0.005 if batches > 1 else 0.2)
    assert measured["seconds"] == measured["later_s"] == 3.0  # three calls
    assert measured["cpu_seconds"] > 0
    # the images go round, so that calls differ and are as long as the run's
    assert [image for call in CALLS for image in call] == [image % (batches * 10) for image in range(4 * rows)]
    assert [len(call) for call in CALLS] == [rows] * 4


@pytest.mark.usefixtures("by_the_clock")
def test_calls_that_go_on_at_the_same_time_share_the_time() -> None:
    def make() -> Callable[[pa.Table], int]:
        meeting = Barrier(2, timeout=60)  # broken, with an error, where calls come one by one
        return lambda images: meeting.wait()

    (images,) = time_loading(load(1))
    assert len(CalibratingActor(make, 10, 2)(images)) == 1


def calibrate_on_ray(make: Callable[[], Callable[[pa.Table], None]], rows: int, at_once: int) -> Calibration:
    def load_all(batch: pa.Table) -> Iterator[pa.Table]:
        return time_loading(pickle.loads(batch["item"][0].as_py()))

    batches = [pa.table({"image": range(first, first + 10)}) for first in (0, 10)]
    loaded = ray.data.from_arrow([pa.table({"item": [pickle.dumps(batches)]})])
    loaded = loaded.map_batches(load_all, batch_size=1, batch_format="pyarrow", num_cpus=0.5)
    with unwrapped_errors(), watch_run("run", None, None) as watch:
        return calibrate(loaded, 20, make, PLAN, rows, at_once, watch.fault_guard)


@pytest.mark.ray
def test_one_actor_takes_what_a_task_has_loaded() -> None:
    measured = calibrate_on_ray(lambda: lambda images: None, 8, 2)
    assert (measured.loaded_images, measured.captioned_images, measured.images) == (20, 16, 3 * 16)
    assert measured.load_s > 0
    assert measured.caption_s > 0
    assert measured.start_s > 0
    assert 0 < measured.cores_per_cpu <= 1
    assert measured.actor_bytes > 1 << 20


@pytest.mark.ray
def test_an_error_of_the_captioner_arrives_as_itself() -> None:
    def fail():  # type: ignore[no-untyped-def]
        raise CheckpointError("The model is missing.")

    with pytest.raises(CheckpointError):
        calibrate_on_ray(fail, 1, 1)
