"""What Ray's memory monitor does to a job: how often it may end a task, and what people are told of it.

When a node runs low on memory, its raylet ends processes and sends the driver a page of text for each. Ray repeats such
tasks without a bound, and prints every page.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jobs.screen import note

SETTINGS = {"RAY_task_oom_retries": "20"}
"""Settings of Ray's that a driver reads when Ray is imported: after so many repetitions a task fails."""

IP = re.compile(r"\bip[=:] ?([0-9a-f.:]+)", re.IGNORECASE)
"""A node in Ray's messages."""

_OF_MONITOR = "running low on memory"
_told: set[str] = set()  # nodes


def line_of_monitor(message: str) -> str:
    """Returns what of one of Ray's messages says that a node's memory ran out; empty where nothing does."""
    return next((line.strip() for line in message.splitlines() if _OF_MONITOR in line), "")


def tell_kills_once() -> None:
    """Lets one line stand for all that raylets tell this driver of killed processes, for each node."""
    from ray._private import worker

    show = worker.print_to_stdstream
    if getattr(show, "__module__", "") == __name__:  # it has been called before
        return

    def tell(data: Mapping[str, Any], *arguments: Any, **options: Any) -> None:
        text = "\n".join(map(str, data.get("lines", ())))
        if _OF_MONITOR not in text:
            show(data, *arguments, **options)
            return
        found = IP.search(text)
        node = f" on node {found[1]}" if found else ""
        if node not in _told:
            _told.add(node)
            note(
                f"Memory runs low{node}: Ray ends tasks there and repeats them, "
                f"{SETTINGS['RAY_task_oom_retries']} times at most. Give the node more memory, or Ray fewer of its "
                "CPUs (ray start --num-cpus). This is said once."
            )

    worker.print_to_stdstream = tell
