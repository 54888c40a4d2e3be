import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from index_builder.work.staging import ABANDONED_AFTER, Staging, _identity, run_recorded
from smallcap.errors import ConfigError, ConflictError, RunError

PLAN = "0123456789abcdef" * 4


def owner(folder: Path, **values: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "owner.json").write_text(json.dumps({"host": socket.gethostname(), "pid": None} | values))
    return folder


def other_process(**changes: str) -> list[str]:
    """This process as an owner file names it, but for some of what names it."""
    names = dict(zip(("boot", "namespace", "start"), _identity(os.getpid()) or (), strict=True))
    return list((names | changes).values())


def test_only_what_has_been_dead_for_long_is_removed(tmp_path: Path) -> None:
    long_ago = time.time() - ABANDONED_AFTER.total_seconds() - 1
    alive = owner(tmp_path / ".staging-alive", pid=os.getpid(), process=_identity(os.getpid()), alive_at=long_ago)
    reused = owner(tmp_path / ".staging-reused", pid=os.getpid(), alive_at=long_ago)
    far = owner(tmp_path / ".staging-far", host="far", pid=1, alive_at=time.time())
    young = owner(tmp_path / ".staging-young", pid=2**22 + 1, alive_at=time.time() - 60)
    dead = owner(tmp_path / ".staging-dead", pid=2**22 + 1, alive_at=long_ago)
    silent = owner(tmp_path / ".staging-silent", host="far", pid=1, alive_at=1)
    ended = owner(tmp_path / ".staging-ended", alive_at=long_ago)
    (tmp_path / ".staging-anonymous" / "work").mkdir(parents=True)
    with Staging(str(tmp_path), PLAN) as staging:
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {alive.name, far.name, young.name, Path(staging.uri).name}
    assert not any(path.exists() for path in (dead, reused, silent, ended, Path(staging.uri)))


def test_the_folder_outlasts_a_block_that_fails(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="stopped"), Staging(str(tmp_path), PLAN) as staging:
        staging.results("stage", int).save(3, 7)
        raise RunError("stopped")
    with Staging(str(tmp_path), PLAN) as again:  # its owner has ended, although the process lives on
        assert again.results("stage", int).load() == {3: 7}


def test_an_error_of_the_options_leaves_nothing_that_is_not_worth_keeping(tmp_path: Path) -> None:
    index = tmp_path / "new" / "index"
    with pytest.raises(ConfigError), Staging(str(index), PLAN) as staging:
        staging.results("stage", int).save(3, 7)
        raise ConfigError("wrong")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError), Staging(str(index), PLAN) as staging:
        staging.results("stage", int).save(3, 7)
        staging.keep()
        raise ConfigError("wrong")
    with pytest.raises(ConfigError), Staging(str(index), PLAN) as again:
        assert again.results("stage", int).load() == {3: 7}
        raise ConfigError("wrong again, but there is work of an earlier call")
    assert Path(again.uri).is_dir()


@pytest.mark.parametrize(
    ("host", "name", "silent_s"),
    [("here", "this", 0), ("here", "this", 10**6), ("here", "container", 60), ("far", "none", 60)],
)
def test_a_live_owner_is_respected(tmp_path: Path, host: str, name: str, silent_s: int) -> None:
    process = {"this": other_process(), "container": other_process(namespace="pid:[1]"), "none": None}[name]
    values = {"host": host, "pid": os.getpid(), "process": process, "alive_at": time.time() - silent_s}
    owner(tmp_path / f".staging-{PLAN[:16]}", **values)
    with pytest.raises(ConflictError, match="already running"), Staging(str(tmp_path), PLAN):
        pass


@pytest.mark.parametrize(
    "values",
    [
        {"pid": 2**22 + 1, "alive_at": 1},
        {"pid": os.getpid(), "alive_at": 1},  # as versions before this wrote it; the number is in use again
        {"host": "far", "pid": 1, "alive_at": time.time() - 700},
        {"pid": 1, "alive_at": time.time() + 86_400},  # the clock was wrong
        {"pid": os.getpid(), "alive_at": time.time(), "process": other_process(start="1")},  # in use again
        {"pid": 2**22 + 1, "alive_at": time.time(), "process": other_process()},
        {"pid": os.getpid(), "alive_at": 1, "process": other_process(boot="before")},
        {"pid": os.getpid(), "alive_at": 1, "process": other_process(namespace="pid:[1]")},
    ],
    ids=["gone", "reused", "silent", "future", "reused-since", "gone-since", "rebooted", "other-container"],
)
def test_a_dead_owner_is_taken_over(tmp_path: Path, values: dict[str, object]) -> None:
    folder = owner(tmp_path / f".staging-{PLAN[:16]}", **values)
    (folder / "work").mkdir()
    (folder / "work" / "part").write_text("kept")
    with Staging(str(tmp_path), PLAN) as staging:
        assert Path(staging.work_uri, "part").read_text() == "kept"
        assert json.loads((folder / "owner.json").read_text())["pid"] == os.getpid()


@dataclass(frozen=True)
class Answer:
    text: str
    counts: dict[str, int]
    names: tuple[str, ...]


def test_finished_items_are_not_run_again(tmp_path: Path) -> None:
    ran: list[int] = []

    def work(item: int) -> Answer:
        ran.append(item)
        if item == 3 and len(ran) < 5:
            raise RunError("the third one fails at first")
        return Answer(f"item {item}", {"n": item}, ("a", str(item)))

    def run(function: object, items: object) -> object:
        for position, item in enumerate(items):  # type: ignore[arg-type,var-annotated]
            yield position, function(item)  # type: ignore[operator]

    with Staging(str(tmp_path), PLAN) as staging:
        results = staging.results("work", Answer)
        with pytest.raises(RunError, match="third"):
            dict(run_recorded(results, work, range(5), run))  # type: ignore[arg-type]
        found = dict(run_recorded(results, work, range(5), run))  # type: ignore[arg-type]
    assert ran == [0, 1, 2, 3, 3, 4]
    assert found == {number: Answer(f"item {number}", {"n": number}, ("a", str(number))) for number in range(5)}
