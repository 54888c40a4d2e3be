"""Faults that end an actor's process: a new process takes the batch again, and the third in a row stops the run.

After a CUDA error a process cannot use its GPU any more, so it ends itself, and Ray starts the actor and its task
again. `FaultGuard` is a plain class that counts; actors tell it what they do through a `FaultGuardClient`. A process
that was killed told it nothing: its successor's beginning gives it away.
"""

from __future__ import annotations

import faulthandler
import os
import re
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, NoReturn

from jobs.cluster.places import Place, this_place
from jobs.cluster.resources import living_nodes
from jobs.cluster.side_actor import SideActor
from smallcap.errors import RunError
from smallcap.phrasing import describe_duration

FaultKind = Literal["cuda", "memory", "start", "stall", "lost"]
Batch = tuple[str, int]  # Ray's task, and the call within it

_MOST_FAULTS = 3  # in a row; the third stops the run
_ANSWER_S = 60.0  # the guard answers at once, unless its machine is very busy
_OF_DEVICE = re.compile(
    r"CUDA (error|driver|unknown error|out of memory)|cudaSuccess|CU(DNN|BLAS)_STATUS|NVIDIA driver"
)
_OUT_OF_MEMORY = re.compile(r"out.of.memory|_ALLOC_FAILED")
_NO_DRIVER = re.compile(r"NVIDIA driver|driver version|CUDA unknown error|No CUDA GPUs|no CUDA-capable device")
_REMEDIES: dict[FaultKind, str] = {
    "cuda": "Look at that GPU (nvidia-smi -q, Xid messages in the kernel's log); if it is broken, go on without it.",
    "memory": "Lower the batch size, let fewer actors share a GPU, or end what else uses its memory.",
    "start": "Ray's log of the actor on that node has the traceback.",
    "stall": "Ray's log of the actor on that node says where it stood still. If a batch may take so long, raise "
    "--stall-timeout-s.",
    "lost": "The kernel's log of that node, or Ray's, says what ended it; often memory ran out.",
}
_GET_A_DRIVER = "Mend the NVIDIA driver of that node, so that nvidia-smi lists the GPU, or run with --device cpu."


@dataclass(frozen=True)
class Fault:
    """What ended an actor's process."""

    kind: FaultKind
    error: str
    place: Place


def kind_of(error: Exception) -> FaultKind | None:
    """Returns what kind of a GPU's fault an exception is; None for a bug, which another process would meet as well."""
    if not isinstance(error, RuntimeError | MemoryError) or not _OF_DEVICE.search(str(error)):
        return None
    return "memory" if _OUT_OF_MEMORY.search(str(error)) else "cuda"


def stop_error(faults: Sequence[Fault], what: str) -> RunError:
    """Returns the error that stops a run after these faults."""
    last = faults[-1]
    earlier = dict.fromkeys(
        fault.error if fault.place == last.place else f"{fault.error} ({fault.place.text})"
        for fault in faults[:-1]
        if (fault.error, fault.place) != (last.error, last.place)
    )
    no_driver = last.kind in ("cuda", "start") and _NO_DRIVER.search(last.error)
    remedy = _GET_A_DRIVER if no_driver else _REMEDIES[last.kind]
    return RunError(
        what,
        where=last.place.text,
        found="; before that ".join([last.error, *earlier]),
        remedy=f"{remedy} The same command continues the job.",
    )


@dataclass
class _Process:
    """The newest process of an actor, as far as it has told."""

    place: Place
    batches: set[Batch] = field(default_factory=set)  # that it has begun and not ended
    reported: bool = False  # whether it has said what ends it


class FaultGuard:
    """Counts the faults of actors, and decides when they are too many.

    They are too many when an actor has three with no batch done in between, or when one batch has three. The first
    means a broken GPU or node, to which Ray mostly gives the actor again; the others of a large cluster do not hide
    it. The second means a batch that no GPU survives; it may alternate with batches that the same actor does well.
    A process that was lost with its node is not counted: nodes come and go.

    Args:
        note: Called with the kind of each fault, and with None for each new process of an actor.
        living: Returns the ids of Ray's nodes that live.
    """

    def __init__(
        self,
        note: Callable[[FaultKind | None], None] = lambda kind: None,
        living: Callable[[], Collection[str]] = living_nodes,
    ) -> None:
        self.fault_counts: Counter[str] = Counter()
        self.restarts = 0
        self._note, self._living = note, living
        self._processes: dict[str, _Process] = {}
        self._in_a_row: dict[str, list[Fault]] = {}
        self._of_batch: dict[Batch, list[Fault]] = {}
        self._stop: RunError | None = None

    def begin_process(self, actor: str, place: Place) -> RunError | None:
        """Notes that an actor has a new process; returns the error that it must raise, if the run is to stop."""
        before = self._processes.get(actor)
        if before is not None:
            self.restarts += 1
            self._note(None)
            if not before.reported and before.place.node_id in self._living():
                self._add(actor, Fault("lost", "The actor's process was killed, or crashed.", before.place))
        self._processes[actor] = _Process(place)
        return self._stop

    def begin_batch(self, actor: str, batch: Batch) -> None:
        """Notes that an actor begins with a batch."""
        self._processes[actor].batches.add(batch)

    def end_batch(self, actor: str, batch: Batch) -> None:
        """Notes that an actor has done a batch."""
        self._processes[actor].batches.discard(batch)
        self._in_a_row.pop(actor, None)
        self._of_batch.pop(batch, None)

    def report_fault(self, actor: str, kind: FaultKind, error: str) -> RunError | Literal["again"]:
        """Counts a fault, which ends the actor's process; returns the error to raise instead, if the run is to stop."""
        process = self._processes[actor]
        if not process.reported:  # else another call of the process met the same fault
            process.reported = True
            self._add(actor, Fault(kind, error, process.place))
        return self._stop or "again"

    def _add(self, actor: str, fault: Fault) -> None:
        self.fault_counts[fault.kind] += 1
        self._note(fault.kind)
        counted = [("An actor failed three times in a row.", self._in_a_row.setdefault(actor, []))]
        for batch in self._processes[actor].batches:  # any of them may be the cause
            counted.append(("A batch failed three times.", self._of_batch.setdefault(batch, [])))
        for what, faults in counted:
            faults.append(fault)
            if len(faults) >= _MOST_FAULTS and self._stop is None:
                self._stop = stop_error(faults, what)


class FaultGuardClient:
    """Lets an actor tell the guard what it does; small and picklable. `begin_process` comes first.

    Args:
        guard: The actor of a `FaultGuard`. If it is lost, the next fault stops the run.
    """

    def __init__(self, guard: SideActor) -> None:
        self._guard = guard

    def begin_process(self) -> RunError | None:
        """Says that the actor's process has begun; returns the error that it must raise, if the run is to stop."""
        import ray

        self._actor = ray.get_runtime_context().get_actor_id()
        self._place = this_place()
        self._batches = threading.local()  # a thread has its own tasks
        stop: RunError | None = self._guard.ask("begin_process", self._actor, self._place, timeout_s=_ANSWER_S)
        return stop

    def begin_batch(self) -> None:
        """Says that the actor begins with a batch, which has the same name if Ray repeats its task."""
        import ray

        task = ray.get_runtime_context().get_task_id()
        before: Batch = getattr(self._batches, "newest", ("", 0))
        self._batches.newest = (task, before[1] + 1 if task == before[0] else 0)
        self._guard.tell("begin_batch", self._actor, self._batches.newest)

    def end_batch(self) -> None:
        """Says that the batch is done."""
        self._guard.tell("end_batch", self._actor, self._batches.newest)

    def end_by(self, kind: FaultKind, error: Exception) -> RunError:
        """Ends this process, so that Ray starts it again, or returns the error with which the run must stop."""
        traceback.print_exception(error)
        stop = self._report(kind, _describe_error(error))
        if stop is None:
            end_process()
        return stop

    def end_stalled(self, seconds: float) -> NoReturn:
        """Ends this process, whose main thread stands still; if the run must stop, the next process says so."""
        faulthandler.dump_traceback(sys.stderr)
        self._report("stall", f"No batch was done for {describe_duration(seconds)}.")
        end_process()

    def _report(self, kind: FaultKind, error: str) -> RunError | None:
        answer = self._guard.ask("report_fault", self._actor, kind, error, timeout_s=_ANSWER_S)
        if answer is None:
            return stop_error([Fault(kind, error, self._place)], "An actor failed.")
        return None if answer == "again" else answer


def end_process() -> NoReturn:
    """Ends this process at once: a clean end would wait for a GPU that answers nothing."""
    sys.stderr.flush()
    os._exit(1)


def _describe_error(error: Exception) -> str:
    """Returns an exception's type, its first line, and the place that raised it."""
    message = str(error).strip().partition("\n")[0]
    innermost = traceback.extract_tb(error.__traceback__)[-1:]
    place = "".join(f" ({os.path.basename(frame.filename)}:{frame.lineno})" for frame in innermost)
    return f"{type(error).__name__}: {message}{place}"
