"""What Ray raises where it does not start, or cannot be joined, in its own words; each is one message with a remedy."""

import errno
import os
from pathlib import Path

import pytest
import ray
from ray.exceptions import AuthenticationError

from jobs.cluster.addresses import parse_address
from jobs.cluster.start_errors import explain_join, explain_start, ray_folder

GCS_LOG = (
    "Failed to start GCS.  Last 1 lines of error files:\n[C] gcs_server.cc:1: bind: {said}\n.Please check "
    "/tmp/ray/session/logs/gcs_server.out for details. Last connection error: Traceback (most recent call last):\n"
    '  File "node.py", line 996, in _init_gcs_client\n    client = GcsClient(\nRpcError: no answer\n'
)


def os_error(number: int, path: str = "/tmp/ray/session_1") -> OSError:
    return OSError(number, os.strerror(number), path)


@pytest.mark.parametrize(
    ("error", "what", "remedy"),
    [
        (
            OSError("validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: /a/long/folder"),
            "sockets",
            "RAY_TMPDIR",
        ),
        (
            ValueError("The configured object store size (8.5 GB) exceeds /dev/shm size (0.06 GB). This will harm"),
            "shared memory",
            "--shm-size",
        ),
        (ValueError("Attempting to cap object store memory usage at 9 bytes, but the"), "shared memory", "/dev/shm"),
        (os_error(errno.ENOSPC), "disk is full", "RAY_TMPDIR"),
        (os_error(errno.EDQUOT), "disk is full", "RAY_TMPDIR"),
        (os_error(errno.EACCES), "cannot use its folder", "RAY_TMPDIR"),
        (os_error(errno.EROFS), "cannot use its folder", "RAY_TMPDIR"),
        (os_error(errno.ENOTDIR), "cannot use its folder", "RAY_TMPDIR"),
        (os_error(errno.EEXIST), "cannot use its folder", "RAY_TMPDIR"),
        (os_error(errno.EAGAIN), "start its processes", "ulimit -u"),
        (RuntimeError("can't start new thread"), "start its processes", "ulimit -u"),
        (os_error(errno.EMFILE), "as many files", "ulimit -n"),
        (RuntimeError(GCS_LOG.format(said="Address already in use")), "port", "RAY_GCS_SERVER_PORT"),
        (ValueError("Ray component gcs_server is trying to use a port number 1 that is used by other"), "port", "free"),
        (RuntimeError(GCS_LOG.format(said="redis")), "head process (GCS)", "gcs_server.out"),
        (
            Exception("The current node timed out during startup. This could happen because some"),
            "raylet",
            "raylet.err",
        ),
        (KeyError("unknown"), "Ray does not start", "smallcap doctor"),
    ],
    ids=range(17),
)
def test_a_local_ray_that_does_not_start(error: Exception, what: str, remedy: str) -> None:
    message = explain_start(error, "[C] said by C++\n    @ 0x1 a frame\n\n")
    assert what in message.what
    assert remedy in message.remedy
    assert message.where == ray_folder()
    assert "Traceback" not in str(message)
    assert "\n" not in message.found


def test_a_file_of_ray_itself_that_cannot_be_used() -> None:
    program = f"{Path(ray.__file__).parent}/core/src/ray/gcs/gcs_server"
    message = explain_start(os_error(errno.EACCES, program))
    assert message.where == program
    assert "Install Ray again" in message.remedy
    assert "as many files" in explain_start(os_error(errno.EMFILE, program)).what


def test_what_is_unknown_is_told_in_rays_words() -> None:
    error = RuntimeError("outer")
    error.__cause__ = ValueError("inner\n  words")
    assert explain_start(error, "said by C++\n").found == "RuntimeError: inner words; said by C++"
    assert explain_start(RuntimeError()).found == "RuntimeError: RuntimeError"
    assert len(explain_start(RuntimeError("x" * 10_000)).found) < 600


def test_rays_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    assert ray_folder() == "/tmp/ray"
    monkeypatch.setenv("TMPDIR", "/scratch")
    assert ray_folder() == "/scratch/ray"
    monkeypatch.setenv("RAY_TMPDIR", "/short")
    assert ray_folder() == "/short/ray"


HEAD = parse_address("head:6379", "--address")
FOUND = parse_address("10.0.0.5:6379", "the Ray that runs on this machine")


@pytest.mark.parametrize(
    ("error", "what", "remedy"),
    [
        (
            AuthenticationError("InvalidAuthToken: Authentication token is missing or incorrect"),
            "token",
            "RAY_AUTH_MODE",
        ),
        (RuntimeError("RPC: InvalidAuthToken"), "token", "RAY_AUTH_TOKEN"),
        (
            RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.59.0\n    Python: 3.11.2"),
            "other versions",
            "same versions",
        ),
        (ConnectionError("no answer"), "cannot join", "ray status"),
        (KeyError("unknown"), "cannot join", "--address local"),
    ],
    ids=range(5),
)
def test_a_cluster_that_cannot_be_joined(error: Exception, what: str, remedy: str) -> None:
    outer = ConnectionError("Failed to connect to Ray cluster at head:6379")
    outer.__cause__ = error
    for raised in (error, outer):
        message = explain_join(raised, HEAD)
        assert what in message.what
        assert remedy in message.remedy
        assert message.where == "--address head:6379"
        assert " ".join(str(error).split())[:60].removeprefix("\n") in message.found


def test_one_that_was_found_may_be_left_alone() -> None:
    message = explain_join(AuthenticationError("no"), FOUND)
    assert "--address local" in message.remedy
    assert "--address local" not in explain_join(AuthenticationError("no"), HEAD).remedy
    assert message.where == "the Ray that runs on this machine, at 10.0.0.5:6379"
