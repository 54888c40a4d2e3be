"""A signal stops a job once, and a second one ends it at once; each in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.cluster.stopping import SIGNALS, Stopped, leave, stoppable

SCRIPT = """
import signal, sys, time
from jobs.cluster.stopping import leave, stoppable, Stopped

def work():
    with stoppable() as signals:
        try:
            print("works", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            print("keeps", flush=True)
            time.sleep(float(sys.argv[1]))
            raise signals.stopped("Stopped: 3 of 5 written") from None

try:
    work()
except Stopped as stopped:
    leave(stopped)
"""


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def start(processes: list[subprocess.Popen[str]], keeping_takes_s: float, first: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", f"import time\n{first}\n{SCRIPT}", str(keeping_takes_s)]
    root = Path(__file__).parents[3]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes.append(subprocess.Popen(command, text=True, cwd=root, **pipes))  # type: ignore[call-overload]
    assert processes[-1].stdout.readline() == "works\n"
    return processes[-1]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_lets_the_job_keep_what_is_done(number: int, processes: list[subprocess.Popen[str]]) -> None:
    process = start(processes, 0)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (out, err) == ("keeps\n", "Stopped: 3 of 5 written\n")
    assert process.returncode == 128 + number


@pytest.mark.parametrize("number", SIGNALS)
def test_the_second_one_leaves_at_once(number: int, processes: list[subprocess.Popen[str]]) -> None:
    process = start(processes, 60)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "keeps\n"
    time.sleep(0.4)  # later than a launcher that passes on what the terminal has sent as well
    process.send_signal(number)
    assert "Left at once." in process.communicate(timeout=30)[1]
    assert process.returncode == 128 + number


def test_one_ctrl_c_that_comes_twice_is_one(processes: list[subprocess.Popen[str]]) -> None:
    process = start(processes, 1)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "Stopped: 3 of 5 written\n"
    assert process.returncode == 130


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_the_process_ends_has_the_status_of_one(
    number: int, processes: list[subprocess.Popen[str]]
) -> None:
    process = start(processes, 0, "import atexit; atexit.register(time.sleep, 60)")
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert process.stderr.readline() == "Stopped: 3 of 5 written\n"
    time.sleep(0.4)
    process.send_signal(number)
    assert process.wait(timeout=30) == 128 + number


def test_what_does_not_say_more_says_that_the_command_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Stopped, match=r"^Stopped: the same command goes on$") as stopped, stoppable():
        raise KeyboardInterrupt
    assert stopped.value.exit_status == 130
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process goes on
    with pytest.raises(SystemExit, match="130"):
        leave(stopped.value)


def test_rays_own_way_of_ending_is_a_stop_as_well() -> None:
    with pytest.raises(Stopped) as stopped, stoppable():
        sys.exit(signal.SIGTERM)
    assert stopped.value.exit_status == 143
    with pytest.raises(SystemExit, match="2"), stoppable():
        sys.exit(2)


def test_the_handlers_before_are_there_afterwards() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with stoppable():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
