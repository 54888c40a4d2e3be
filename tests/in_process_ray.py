"""Ray's calls that the jobs make, answered in this process: tests of what a job does need neither workers nor a wait.

What goes to a task or an actor is pickled, as Ray does it, and an actor is found again by its handle. Work items come
last one first: another schedule than Ray's. Whether Ray itself is used rightly is tested on Ray (marker `ray`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from ray import cloudpickle
from ray.data import DataContext

from jobs.cluster.side_actor import SideActor

NODE = {"Alive": True, "NodeID": "0" * 56, "Resources": {"CPU": 4.0, "memory": 16e9}}
CONTEXT = SimpleNamespace(
    get_node_id=lambda: NODE["NodeID"],
    get_actor_id=lambda: "0" * 32,  # there is one actor in a pool
    get_task_id=lambda: "0" * 48,
    get_accelerator_ids=lambda: {"GPU": []},
)


@contextmanager
def in_process_ray() -> Iterator[None]:
    """Puts the stand-ins in Ray's place for a while."""
    stand_ins = {
        "nodes": lambda: [NODE],
        "remote": _remote,
        "put": lambda value: _Answer(lambda: value),
        "get": _get,
        "wait": lambda answers, timeout=None: (answers, []),
        "kill": lambda actor: None,
        "get_runtime_context": lambda: CONTEXT,
        "data.from_arrow": Dataset,
        "data.from_items": lambda rows, **_: Dataset([pa.Table.from_pylist([row]) for row in rows]),
    }
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(f"ray.{name}", stand_in)
        for module in ("session", "nodes"):
            monkeypatch.setattr(f"jobs.cluster.{module}.connect", lambda *_: None)
        monkeypatch.setattr("jobs.cluster.liveness.ray_listeners", list)
        # Nor is this a process that does nothing but caption.
        monkeypatch.setattr("jobs.captioning.caption.keep_freed_memory", lambda: None)
        yield


def _pickled(value: Any) -> Any:
    return cloudpickle.loads(cloudpickle.dumps(value))


class Dataset:
    """A pipeline of Ray Data over some tables."""

    def __init__(self, tables: Sequence[pa.Table]) -> None:
        self._blocks: Iterable[pa.Table] = reversed(tables)
        self.context = DataContext.get_current().copy()

    def map_batches(
        self,
        function: Any,
        *,
        batch_size: int,
        batch_format: str,
        fn_constructor_args: tuple[Any, ...] = (),
        fn_constructor_kwargs: dict[str, Any] | None = None,
        fn_kwargs: dict[str, Any] | None = None,
        **placement: Any,
    ) -> Dataset:
        assert batch_format == "pyarrow"
        following = Dataset([])
        given = _pickled((function, fn_constructor_args, fn_constructor_kwargs or {}, fn_kwargs or {}))
        following._blocks = _mapped(self._blocks, *given, batch_size)
        return following

    def iter_internal_ref_bundles(self) -> Iterator[Any]:
        for block in self._blocks:
            answer = _Answer(lambda block=block: block)
            yield SimpleNamespace(block_refs=[answer], num_rows=lambda block=block: len(block))


def _mapped(
    blocks: Iterable[pa.Table],
    function: Any,
    constructor_args: Any,
    constructor_kwargs: dict[str, Any],
    kwargs: dict[str, Any],
    batch_size: int,
) -> Iterator[pa.Table]:
    call = function(*constructor_args, **constructor_kwargs) if isinstance(function, type) else function
    for batch in _batches(blocks, batch_size):
        result = call(batch, **kwargs)
        yield from [result] if isinstance(result, pa.Table) else result


def _batches(blocks: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    gathered = None
    for block in blocks:
        gathered = block if gathered is None else pa.concat_tables([gathered, block])
        while len(gathered) >= size:
            yield gathered.slice(0, size).combine_chunks()
            gathered = gathered.slice(size)
    if gathered:
        yield gathered.combine_chunks()


class _Answer:
    """What a remote call returns; its error is raised when it is asked for."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._value, self._error = None, None
        try:
            self._value = call()
        except Exception as error:  # noqa: BLE001 - it is raised by `get`
            self._error = error

    def get(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._value


def _get(answers: Any, timeout: float | None = None) -> Any:
    return [answer.get() for answer in answers] if isinstance(answers, list) else answers.get()


def _remote(target: Any = None, **options: Any) -> Any:
    return _remote if target is None else _Remote(target)


class _Remote:
    """A task, or the class of an actor."""

    def __init__(self, target: Any, returns: int = 1) -> None:
        self._target, self._returns = target, returns

    def options(self, num_returns: int = 1, **options: Any) -> _Remote:
        return _Remote(self._target, num_returns)

    def remote(self, *arguments: Any) -> Any:
        target, *arguments = _pickled((self._target, *map(_resolved, arguments)))
        if isinstance(target, type):
            return Handle.of(target(*arguments))
        answer = _Answer(lambda: target(*arguments))
        if self._returns == 1:
            return answer
        return [_Answer(lambda place=place: answer.get()[place]) for place in range(self._returns)]


def _resolved(argument: Any) -> Any:
    return argument.get() if isinstance(argument, _Answer) else argument


class Handle:
    """A handle of an actor; a pickled one refers to the same actor."""

    _actors: dict[int, Any] = {}  # noqa: RUF012 - shared

    def __init__(self, number: int) -> None:
        self._number = number

    @classmethod
    def of(cls, actor: Any) -> Handle:
        """Returns a handle of an object, which thereby is an actor."""
        cls._actors[len(cls._actors)] = actor
        return cls(len(cls._actors) - 1)

    def __reduce__(self) -> Any:
        return Handle, (self._number,)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._actors[self._number], name)

        def remote(*arguments: Any) -> _Answer:
            sent = _pickled([_resolved(argument) for argument in arguments])
            return _Answer(lambda: _pickled(method(*sent)))

        return SimpleNamespace(remote=remote)


class LocalActor(SideActor):
    """Calls here what a client calls remotely; its actor is the object itself."""

    def ask(self, method: str, *arguments: Any, timeout_s: float | None = None) -> Any:
        return getattr(self._actor, method)(*arguments)

    tell = ask
