"""What a dry run times, by a clock that only its stand-ins move."""

from collections.abc import Callable, Iterator
from functools import partial
from threading import Barrier

import pyarrow as pa
import pytest

from jobs.captioning.calibration import calibrate
from jobs.cluster.errors import unwrapped_errors
from smallcap.errors import CheckpointError
from smallcap.machine.actor_plan import ActorPlan

PLAN = ActorPlan("cpu", "float32", 1, 1.0, 0.0, 1)
CLOCK = 0.0
CALLS: list[list[int]] = []


def load(batches: int) -> Iterator[pa.Table]:
    global CLOCK  # noqa: PLW0603 - what is pickled finds the module's
    for number in range(batches):
        CLOCK += 2.0 if number == 0 else 0.05
        yield pa.table({"image": range(number * 10, number * 10 + 10)})


def make_captioner() -> partial[None]:
    global CLOCK  # noqa: PLW0603
    CLOCK += 5.0
    return partial(caption)


def caption(images: pa.Table) -> None:
    global CLOCK  # noqa: PLW0603
    assert images["image"].num_chunks == 1
    CALLS.append(images["image"].to_pylist())
    CLOCK += 1.0 + (2.0 if len(CALLS) == 1 else 0.0)  # the first call records


@pytest.mark.parametrize(("batches", "rows"), [(1, 10), (1, 4), (4, 10), (4, 16), (4, 100)])
def test_what_happens_only_once_is_left_out(batches: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.perf_counter", lambda: CLOCK)
    CALLS.clear()
    measured = calibrate(partial(load, batches), make_captioner, PLAN, rows, 1)
    assert measured.load_s == pytest.approx(0.005 if batches > 1 else 0.2)
    assert measured.start_s == pytest.approx(2 + 0.05 * (batches - 1) + 5 + 3)
    assert (measured.loaded_images, measured.captioned_images) == (10 * batches, rows)
    assert measured.caption_cpu_s > 0
    assert 0 < measured.cores_per_cpu <= 1
    assert measured.images == 3 * rows
    assert measured.caption_s == pytest.approx(1 / rows)
    assert measured.actor_bytes > 1 << 20
    # the images go round, so that calls differ and are as long as the run's
    assert [image for call in CALLS for image in call] == [image % (batches * 10) for image in range(4 * rows)]
    assert [len(call) for call in CALLS] == [rows] * 4


def test_calls_that_go_on_at_the_same_time_share_the_time() -> None:
    def make() -> Callable[[pa.Table], int]:
        meeting = Barrier(2, timeout=60)  # broken, with an error, where calls come one by one
        return lambda images: meeting.wait()

    assert calibrate(partial(load, 1), make, PLAN, rows=10, at_once=2).images == 3 * 2 * 10


@pytest.mark.ray
def test_an_error_of_the_captioner_arrives_as_itself() -> None:
    def fail():  # type: ignore[no-untyped-def]
        raise CheckpointError("The model is missing.")

    with pytest.raises(CheckpointError), unwrapped_errors():
        calibrate(lambda: [pa.table({"image": [0]})], fail, PLAN, 1, 1)
