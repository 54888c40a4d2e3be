"""A build that dies: run by `test_restart.py` as a process of its own.

    python killed_build.py CONFIG.json STAGE DONE VICTIM

It kills the driver (itself), or with VICTIM `worker` a Ray worker, when DONE items of STAGE are finished; STAGE
`pointer` is the moment before the pointer is switched. VICTIM `process` is a driver that runs its work items itself.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import index_builder.versions.publish as publish_module
from index_builder.build import build_index
from index_builder.work.task_runner import LocalRunner, TaskRunner
from jobs.cluster.session import connect
from jobs.cluster.tasks import RayRunner
from smallcap.config import IndexConfig


def die(*arguments: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_a_worker() -> None:
    """Kills the next worker of this session's Ray that is seen at work."""
    import ray

    session = Path(ray._private.worker._global_node.get_session_dir_path()).name
    for _ in range(3000):
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                title = (folder / "cmdline").read_bytes()
                mine = title.startswith(b"ray::MapBatches") and session.encode() in (folder / "environ").read_bytes()
            except OSError:
                continue
            if mine or title.startswith(b"ray::MapWorker"):
                os.kill(int(folder.name), signal.SIGKILL)
                print(f"killed {title[:60].decode()}", flush=True)
                return
        time.sleep(0.002)
    print("no worker was seen", flush=True)


def main(config_file: str, stage: str, done: int, victim: str) -> None:
    config = IndexConfig.model_validate(json.loads(Path(config_file).read_text()))
    runner: TaskRunner = LocalRunner()
    if victim != "process":
        connect("local")
        runner = RayRunner("run")
    if stage == "pointer":
        publish_module.switch_pointer = die
    killers: list[threading.Thread] = []

    def watch(name: str, finished: int, total: int) -> None:
        if name == stage and finished and finished >= min(done, total) and not killers:
            if victim != "worker":
                die()
            killers.append(threading.Thread(target=kill_a_worker))
            killers[0].start()

    report = build_index(config, runner, watch)
    for killer in killers:
        killer.join()
    print(json.dumps({"index_id": report.manifest.index_id}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
