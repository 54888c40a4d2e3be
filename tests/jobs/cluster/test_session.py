import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from ray.exceptions import AuthenticationError

from benchmarks.measuring import tree_of
from jobs.cluster import session
from jobs.cluster.addresses import Address, NoClusterError, parse_address
from jobs.cluster.session import connect, limit_blocks
from smallcap.errors import RunError
from tests.job_processes import StartJob, free_port


@pytest.mark.ray
def test_blocks_are_limited_for_one_dataset_alone() -> None:
    import ray

    def four_tables(batch: pa.Table) -> Iterator[pa.Table]:
        for _ in range(4):
            yield pa.table({"bytes": [b"0" * 1000]})

    def blocks(limit: int | None) -> int:
        dataset = ray.data.from_arrow(pa.table({"item": [0]}))
        if limit is not None:
            limit_blocks(dataset, limit)
        return int(dataset.map_batches(four_tables, batch_format="pyarrow").materialize().num_blocks())

    assert blocks(1000) == 4
    assert blocks(None) == 1


@pytest.mark.ray
def test_a_local_ray_has_no_processes_that_serve_nobody() -> None:
    programs = {Path(word).name for pid in tree_of(os.getpid()) for word in words_of(pid)[:4]}
    assert "raylet" in programs
    assert not programs & {"dashboard.py", "monitor.py", "log_monitor.py"}


def words_of(pid: int) -> list[str]:
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_text().split("\0")
    except OSError:  # it has ended
        return []


@pytest.mark.ray
def test_a_process_that_is_idle_stays_for_the_next_task() -> None:
    import ray

    def work() -> int:
        time.sleep(1)
        return os.getpid()

    processes = ray.get([ray.remote(num_cpus=0)(work).remote() for _ in range(8)])  # more than Ray counts CPUs
    time.sleep(3)  # Ray's own limit is one second
    assert all((Path("/proc") / str(pid)).exists() for pid in processes)


def test_the_commands_import_ray_data_only_after_its_settings_are_made() -> None:
    code = "import sys, jobs.cli, jobs.caption, jobs.cluster.session; print('ray.data' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


class TestConnecting:
    @pytest.fixture(autouse=True)
    def init(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
        """The calls of `ray.init`, each with the environment that it saw, in a process that has no Ray."""
        import ray

        calls: list[dict[str, Any]] = []
        for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            monkeypatch.setenv(name, "")  # so that it is gone afterwards as well
            monkeypatch.delenv(name)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(
            ray, "init", lambda **arguments: calls.append(arguments | {"environment": dict(os.environ)})
        )
        monkeypatch.setattr(session, "reach", lambda address: None)
        monkeypatch.setattr(session, "ask_head", lambda address: None)
        monkeypatch.setattr(session, "find_running", lambda by_process: None)
        setup = "ray._private.authentication.authentication_token_setup"
        monkeypatch.setattr(f"{setup}.maybe_enable_token_auth_if_token_available", lambda **_: False)
        return calls

    @pytest.fixture
    def running(self, monkeypatch: pytest.MonkeyPatch) -> Address:
        """A Ray that runs on this machine."""
        found = parse_address("10.0.0.5:6379", "the Ray that runs on this machine")
        monkeypatch.setattr(session, "find_running", lambda by_process: found)
        return found

    @pytest.mark.parametrize("error", [ConnectionError("no answer"), AuthenticationError("no"), KeyError("odd")])
    @pytest.mark.parametrize("address", ["head:6379", "local", None])
    def test_a_ray_that_refuses_is_one_message(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
        error: Exception,
        address: str | None,
    ) -> None:
        import ray

        def refuse(**_: Any) -> None:
            os.write(2, b"said by C++")
            raise error

        monkeypatch.setattr(ray, "init", refuse)
        with pytest.raises(RunError) as caught:
            connect(address)
        assert caught.value.remedy
        assert capfd.readouterr().err == ""
        assert ("said by C++" in caught.value.found) == ("token" not in caught.value.what)

    def test_a_busy_machine_may_start_ray_twice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import ray

        late = Exception("The current node timed out during startup. This could happen because ...")
        errors = [late, None, late, late]

        def start(**_: Any) -> None:
            if error := errors.pop(0):
                raise error

        monkeypatch.setattr(ray, "init", start)
        connect("local")
        assert len(errors) == 2
        with pytest.raises(RunError, match="does not start"):
            connect("local")
        assert errors == []

    def test_a_head_is_asked_before_ray_waits_for_it(
        self, init: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def ask(address: Address) -> None:
            raise NoClusterError("There is none.", where=address.where)

        monkeypatch.setattr(session, "ask_head", ask)
        with pytest.raises(NoClusterError, match="head:6379"):
            connect("head:6379")
        assert not init

    def test_a_cluster_is_joined_without_a_word(
        self, init: list[dict[str, Any]], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        connect("head:6379")
        monkeypatch.setenv("RAY_ADDRESS", "other:6379")
        connect()
        assert [call["address"] for call in init] == ["head:6379", "other:6379"]
        assert not any("num_cpus" in call for call in init)  # a cluster has its own
        assert capfd.readouterr().err == ""

    @pytest.mark.parametrize("address", [None, "auto"])
    def test_a_ray_that_runs_here_is_joined_and_named(
        self, init: list[dict[str, Any]], running: Address, capfd: pytest.CaptureFixture[str], address: str | None
    ) -> None:
        connect(address)
        (call,) = init
        assert call["address"] == running.text
        assert capfd.readouterr().err == (
            "Joined the Ray cluster at 10.0.0.5:6379, which already runs on this machine; --address local starts one "
            "for this job alone.\n"
        )

    @pytest.mark.usefixtures("running")
    def test_local_starts_one_whatever_runs(
        self, init: list[dict[str, Any]], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        connect("local")
        monkeypatch.setenv("RAY_ADDRESS", "local")
        connect()
        assert [call["address"] for call in init] == ["local", "local"]
        assert init[0]["num_cpus"] >= 4
        assert capfd.readouterr().err == ""

    def test_where_none_runs_one_is_started_but_not_for_auto(self, init: list[dict[str, Any]]) -> None:
        connect()
        assert [call["address"] for call in init] == ["local"]
        with pytest.raises(RunError, match="No Ray cluster runs on this machine"):
            connect("auto")

    def test_a_local_ray_has_a_token_of_its_own(self, init: list[dict[str, Any]]) -> None:
        connect()
        assert len(init[0]["environment"]["RAY_AUTH_TOKEN"]) == 64

    def test_what_takes_long_is_said(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        import ray

        monkeypatch.setattr(session, "_SILENCE_S", 0.1)
        monkeypatch.setattr(ray, "init", lambda **_: time.sleep(1))
        connect("head:6379")
        connect("local")
        lines = capfd.readouterr().err.splitlines()
        assert {line.split(" …")[0] for line in lines} == {"Connecting to Ray at head:6379", "Starting Ray"}
        assert len(lines) >= 4


RUN = "import sys; from jobs.cluster.session import connect; import ray; connect(*sys.argv[1:]); "
SHOW = "print(ray.get_runtime_context().gcs_address, ray.cluster_resources()['CPU'])"


def run_job(*address: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Connects as a job does, in a process of its own, and says to which head."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", RUN + SHOW, *address],
        env=inherited | {"PYTHONPATH": str(Path(__file__).parents[3])} | environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.fixture
def short_folder() -> Iterator[str]:
    """A folder for Ray with a name that leaves room for its sockets."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield folder


@pytest.mark.own_ray
@pytest.mark.slow
def test_a_ray_that_runs_on_the_machine(short_folder: str, tmp_path: Path, start_job: StartJob) -> None:
    command = [
        Path(sys.executable).parent / "ray", "start", "--head", "--block", f"--port={free_port()}", "--num-cpus=3",
        "--include-dashboard=false", "--min-worker-port=0", "--max-worker-port=0",
        f"--ray-client-server-port={free_port()}", "--dashboard-agent-listen-port=0",
    ]  # fmt: skip
    here = {"RAY_TMPDIR": short_folder, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
    head = start_job(command, tmp_path / "head.log", **here)
    left_behind = Path(short_folder, "ray", "ray_current_cluster")
    head.until(left_behind.exists, 90)
    address = left_behind.read_text()
    joined = run_job(**here)
    assert joined.stdout.split() == [address, "3.0"], joined.stderr
    assert f"Joined the Ray cluster at {address}, which already runs on this machine" in joined.stderr
    without_token = run_job(RAY_TMPDIR=short_folder, HOME="/proc/nowhere")
    assert "wants a token" in without_token.stderr
    assert "--address local" in without_token.stderr
    alone = run_job("local", **here)
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout.split()[0] != address
    head.kill_all()
    stale = run_job(**here)
    assert left_behind.read_text() == address
    assert stale.returncode == 0, stale.stderr
    assert stale.stdout.split()[0] != address
    assert "Joined" not in stale.stderr


@pytest.mark.own_ray
@pytest.mark.slow
def test_a_real_ray_that_does_not_start_is_one_message(tmp_path: Path) -> None:
    folder = tmp_path / ("a-name-that-leaves-no-room-for-sockets-" * 3)
    folder.mkdir()
    for name in ("TMPDIR", "RAY_TMPDIR"):
        refused = run_job("local", **{name: str(folder)})
        assert "Ray cannot make its sockets" in refused.stderr
    (tmp_path / "ray").write_text("no folder")
    assert "Ray cannot use its folder" in run_job("local", RAY_TMPDIR=str(tmp_path)).stderr


@pytest.mark.own_ray
@pytest.mark.slow
def test_what_listens_and_is_no_head_is_one_message() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        refused = run_job(f"127.0.0.1:{server.getsockname()[1]}")  # Ray itself tries for fourteen minutes
        assert "not a head of a Ray cluster" in refused.stderr
