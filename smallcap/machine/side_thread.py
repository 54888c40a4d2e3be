"""A thread with a CUDA stream, for work that goes on beside that of other threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Prepared = TypeVar("Prepared")


class SideThread:
    """Runs functions in one thread and, on a GPU, on one stream; both last as long as this object.

    They last because cuDNN keeps its plans for each thread, and torch keeps freed memory for each stream. The stream
    has another priority than those on which decoding steps are recorded, so that torch cannot give out the same one.

    Args:
        device: The device of the work.
        name: The thread's name.
    """

    def __init__(self, device: torch.device, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, name)
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    def submit(
        self, function: Callable[Arguments, Result], *arguments: Arguments.args, **keywords: Arguments.kwargs
    ) -> Future[Result]:
        """Queues a call; when its result comes, the device has finished it."""

        def run() -> Result:
            with torch.cuda.stream(self._stream):  # does nothing for None
                result = function(*arguments, **keywords)
            if self._stream is not None:
                self._stream.synchronize()
            return result

        return self._thread.submit(run)

    def prepare_ahead(
        self,
        calls: Iterable[tuple[Any, ...]],
        prepare: Callable[..., Prepared],
        finish: Callable[[Prepared], Result],
    ) -> Iterator[Result]:
        """Yields what `finish` makes of what `prepare` makes of each call's arguments, which is prepared meanwhile."""
        waiting: Future[Prepared] | None = None
        for arguments in calls:
            following = self.submit(prepare, *arguments)
            if waiting is not None:
                yield finish(waiting.result())
            waiting = following
        if waiting is not None:
            yield finish(waiting.result())
