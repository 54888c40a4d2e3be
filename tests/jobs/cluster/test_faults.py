"""The guard counts faults in a row; an actor ends its process, or raises the one error that stops the run."""

import pickle
from typing import Any, NoReturn

import pytest
import torch

from jobs.cluster import faults
from jobs.cluster.errors import GuardedActor
from jobs.cluster.faults import Fault, FaultGuard, FaultGuardClient, kind_of, stop_error
from jobs.cluster.places import Place
from jobs.cluster.side_actor import SideActor
from smallcap.errors import CheckpointError, RunError
from tests.in_process_ray import CONTEXT, NODE, LocalActor

HERE = Place(str(NODE["NodeID"]), "node gpu-3 (10.0.0.3), GPU 0 (NVIDIA L4, GPU-5f)")
THERE = Place(str(NODE["NodeID"]), "node gpu-4 (10.0.0.4), GPU 0")
ILLEGAL = torch.AcceleratorError(
    "CUDA error: an illegal memory access was encountered\nSearch for `cudaErrorIllegalAddress' in https://docs.nvidia.com"
)
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
NO_DRIVER = RuntimeError("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU.")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ILLEGAL, "cuda"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "cuda"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemmEx"), "cuda"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), "cuda"),
        (RuntimeError("Error: 'err == cudaSuccess' failed: CUDA error 719 unspecified launch failure"), "cuda"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), "memory"),
        (NO_DRIVER, "cuda"),
        (NO_MEMORY, "memory"),
        (MemoryError("std::bad_alloc: out_of_memory: CUDA error at: pool.hpp"), "memory"),
        (MemoryError(), None),
        (RuntimeError("Expected all tensors to be on the same device, but found cuda:0 and cpu!"), None),
        (ValueError("CUDA error"), None),
        (RunError("Out of memory.", found="CUDA out of memory"), None),
    ],
)
def test_faults_of_a_gpu_are_told_from_bugs(error: Exception, kind: str | None) -> None:
    assert kind_of(error) == kind


class Counted(FaultGuard):
    """A guard on living nodes, unless a test takes them away."""

    def __init__(self) -> None:
        self.noted: list[str | None] = []
        self.nodes = {HERE.node_id}
        super().__init__(self.noted.append, lambda: self.nodes)


def test_a_batch_between_two_faults_ends_the_row_of_its_actor_alone() -> None:
    guard = Counted()
    for actor in ("a", "b"):
        assert guard.begin_process(actor, HERE) is None
        for _ in range(2):
            guard.begin_batch(actor, (actor, 0))
            assert guard.report_fault(actor, "cuda", "ECC") == "again"
            assert guard.begin_process(actor, HERE) is None
    guard.begin_batch("b", ("b", 0))
    guard.end_batch("b", ("b", 0))  # a large cluster goes on, and yet the broken GPU is found
    guard.begin_batch("b", ("c", 0))
    assert guard.report_fault("b", "stall", "nothing") == "again"
    guard.begin_batch("a", ("a", 0))
    stop = guard.report_fault("a", "cuda", "ECC")
    assert isinstance(stop, RunError)
    assert guard.begin_process("b", HERE) is stop  # every actor that begins now learns it
    assert guard.fault_counts == {"cuda": 5, "stall": 1}
    assert guard.restarts == 5
    assert guard.noted.count(None) == 5


def test_a_batch_that_no_process_survives_is_found_among_others_that_succeed() -> None:
    guard = Counted()
    guard.begin_process("a", HERE)
    for number in range(3):
        guard.begin_batch("a", ("good", number))
        guard.end_batch("a", ("good", number))
        guard.begin_batch("a", ("bad", 1))
        stop = guard.report_fault("a", "cuda", "illegal")
        guard.begin_process("a", HERE)
    assert isinstance(stop, RunError)
    assert stop.what == "A batch failed three times."


def test_a_killed_process_is_found_by_its_successor_unless_its_node_is_gone() -> None:
    guard = Counted()
    guard.begin_process("a", HERE)
    guard.nodes = set()
    for _ in range(5):
        assert guard.begin_process("a", HERE) is None
    assert not guard.fault_counts
    guard.nodes = {HERE.node_id}
    for _ in range(2):
        assert guard.begin_process("a", HERE) is None
    stop = guard.begin_process("a", THERE)
    assert isinstance(stop, RunError)
    assert stop.where == HERE.text  # where the process was that died
    assert "killed, or crashed" in stop.found


def test_what_is_done_takes_no_memory() -> None:
    guard = Counted()
    guard.begin_process("a", HERE)
    for number in range(5):
        guard.begin_batch("a", ("task", number))
        guard.report_fault("a", "cuda", "illegal")
        guard.begin_batch("a", ("task", number))
        guard.end_batch("a", ("task", number))
    assert not guard._of_batch
    assert not guard._in_a_row


def test_the_message_names_node_gpu_errors_and_remedy() -> None:
    same = Fault("cuda", "AcceleratorError: CUDA error: ECC", HERE)
    error = pickle.loads(pickle.dumps(stop_error([same, same, same], "An actor failed three times in a row.")))
    lines = str(error).splitlines()
    assert lines[:3] == [
        "An actor failed three times in a row.",
        f"  where: {HERE.text}",
        "  found: AcceleratorError: CUDA error: ECC",
    ]
    assert "nvidia-smi" in lines[3]
    assert lines[3].endswith("The same command continues the job.")
    others = [Fault("stall", "No batch was done for 10 min.", THERE), Fault("start", "OSError: gone", HERE), same]
    found = stop_error(others, "").found
    assert found == (
        "AcceleratorError: CUDA error: ECC; before that No batch was done for 10 min. (node gpu-4 (10.0.0.4), GPU 0)"
        "; before that OSError: gone"
    )


@pytest.mark.parametrize(
    ("kind", "error", "remedy"),
    [
        ("cuda", str(NO_DRIVER), "Mend the NVIDIA driver"),
        ("start", "AssertionError: the NVIDIA driver is too old", "Mend the NVIDIA driver"),
        ("memory", "CUDA out of memory", "batch size"),
        ("start", "OSError: libfoo.so", "traceback"),
        ("stall", "", "--stall-timeout-s"),
        ("lost", "", "kernel's log"),
    ],
)
def test_every_kind_has_its_remedy(kind: Any, error: str, remedy: str) -> None:
    assert remedy in stop_error([Fault(kind, error, HERE)], "").remedy


class LostGuard(SideActor):
    """A guard that is gone."""

    def ask(self, method: str, *arguments: Any, timeout_s: float | None = None) -> None:
        return None

    tell = ask


class ProcessEnded(BaseException):
    """Stands for the end of a process: nothing after it happens."""


@pytest.fixture(autouse=True)
def in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def end_process() -> NoReturn:
        raise ProcessEnded

    monkeypatch.setattr(faults, "end_process", end_process)
    monkeypatch.setattr("ray.get_runtime_context", lambda: CONTEXT)
    monkeypatch.setattr("ray.nodes", lambda: [NODE])


class Flaky(GuardedActor):
    """Fails to load, or in its calls, as often as a list says."""

    def load(self, start_errors: list[Exception], errors: list[Exception]) -> None:
        self._errors = errors
        if start_errors:
            raise start_errors.pop()

    def process(self, value: int) -> int:
        if self._errors:
            raise self._errors.pop()
        return value + 1


def run_to_the_end(start_errors: list[Exception], errors: list[Exception], guard: FaultGuard) -> tuple[int, int]:
    """Does what Ray does: starts the actor again and repeats its call. Returns the result and the processes it took."""
    for processes in range(1, 10):
        try:
            return Flaky(start_errors, errors, faults=FaultGuardClient(LocalActor(guard)))(1), processes
        except ProcessEnded:
            continue
    raise AssertionError("It never ends.")


@pytest.mark.parametrize("error", [ILLEGAL, NO_MEMORY, NO_DRIVER])
@pytest.mark.parametrize("times", [1, 2])
def test_a_new_process_repeats_the_call_after_a_fault(error: Exception, times: int) -> None:
    assert run_to_the_end([], [error] * times, FaultGuard()) == (2, 1 + times)
    assert run_to_the_end([error] * times, [], FaultGuard()) == (2, 1 + times)
    assert run_to_the_end([OSError("no such library")], [error], FaultGuard()) == (2, 3)


def test_the_third_fault_stops_the_run() -> None:
    with pytest.raises(RunError, match="three times in a row") as caught:
        run_to_the_end([], [ILLEGAL] * 3, FaultGuard())
    assert caught.value.found.startswith("AcceleratorError: CUDA error: an illegal memory access was encountered (")
    assert "Search for" not in str(caught.value)
    with pytest.raises(RunError, match="no such library") as caught:
        run_to_the_end([OSError("no such library")] * 3, [], FaultGuard())
    assert "(test_faults.py:" in caught.value.found


def test_errors_that_another_process_would_meet_again_are_not_repeated() -> None:
    for error in (ZeroDivisionError("a bug"), RunError("CUDA out of memory at a batch of one.")):
        errors: list[Exception] = [error, error]
        with pytest.raises(type(error)):
            run_to_the_end([], errors, FaultGuard())
        assert len(errors) == 1
    incomplete: list[Exception] = [CheckpointError("It is incomplete.")] * 2
    with pytest.raises(CheckpointError):
        run_to_the_end(incomplete, [], FaultGuard())
    assert len(incomplete) == 1


def test_a_fault_that_nobody_counts_stops_the_run() -> None:
    actor = Flaky([], [ILLEGAL], faults=FaultGuardClient(LostGuard(None)))
    for _ in range(2):  # its GPU is lost to this process: the second call does not try it
        with pytest.raises(RunError, match="An actor failed"):
            actor(1)
    unguarded = Flaky([], [ILLEGAL])
    with pytest.raises(torch.AcceleratorError):
        unguarded(1)


def test_the_calls_of_one_task_are_told_apart() -> None:
    guard = FaultGuard()
    client = FaultGuardClient(LocalActor(guard))
    actor = Flaky([], [], faults=client)
    begun = []
    guard.begin_batch = lambda actor, batch: begun.append(batch)  # type: ignore[method-assign]
    assert [actor(1), actor(2)] == [2, 3]
    assert begun == [("0" * 48, 0), ("0" * 48, 1)]


def test_a_stall_ends_the_process_whatever_the_guard_says(capfd: pytest.CaptureFixture[str]) -> None:
    guard = FaultGuard()
    for _ in range(3):
        client = FaultGuardClient(LocalActor(guard))
        assert client.begin_process() is None
        with pytest.raises(ProcessEnded):
            client.end_stalled(90.0)
    assert "test_a_stall_ends_the_process" in capfd.readouterr().err  # the stacks say where it stood still
    stop = FaultGuardClient(LocalActor(guard)).begin_process()
    assert isinstance(stop, RunError)
    assert stop.found == "No batch was done for 1 min 30 s."
