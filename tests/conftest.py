"""What tests of several rooms share: a tiny CLIP, one Ray, and an S3 server in a process of its own.

S3 starts before Ray: Ray's workers are other processes and take the endpoint from the environment they inherit.
"""

from __future__ import annotations

import os

# Before anything of Ray, torch or faiss is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("SMALLCAP_STORAGE_PATIENCE_S", "2")  # tests of storage that fails for good do not wait
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the cores to the tests' other processes

import json
import subprocess
import sys
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from benchmarks.tiny_models import make_tiny_clip, make_tiny_smallcap
from index_builder.shards.template import make_index
from smallcap import storage
from smallcap.index.caption_store import CAPTION_STORE_COLUMNS, write_caption_file
from smallcap.index.faiss_index import transforms_of
from smallcap.index.manifest import (
    EncoderIdentity,
    FileEntry,
    IndexManifest,
    RemovedEntry,
    ShardEntry,
    SourceEntry,
    manifest_uri,
    write_pointer,
)
from tests.hub_server import Hub
from tests.index_files import PublishIndex
from tests.job_processes import JobProcess, StartJob, free_port

settings.register_profile("without deadline", deadline=None)  # a busy machine is not a failure
settings.load_profile("without deadline")

_session_rays: list[str] = []  # the addresses of Rays that `ray_session` has started in this process


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIPModel folder of transformers: seeded random weights, a byte-level tokenizer, dim 16."""
    return make_tiny_clip(tmp_path_factory.mktemp("tiny-clip"), seed=0)


@pytest.fixture(scope="session")
def other_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `tiny_clip`, with other weights."""
    return make_tiny_clip(tmp_path_factory.mktemp("other-clip"), seed=1)


@pytest.fixture(scope="session")
def tiny_smallcap(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    """A SmallCap checkpoint whose vision tower is `tiny_clip`'s, with a random GPT-2 and GPT-2's own tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-smallcap")
    make_tiny_smallcap(folder, tiny_clip)
    return folder


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of an S3 server of this test session; `AWS_ENDPOINT_URL` and dummy credentials are exported."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{port}"
    given = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in given}
    try:
        _wait_for(endpoint, server)
        os.environ.update(given)
        yield endpoint
    finally:
        server.terminate()
        server.wait()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


class FaultProxy:
    """A running `tests/fault_proxy.py`, whose `FaultPlan` is replaced by `plan` and whose counts are `done()`."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint

    def plan(self, **plan: Any) -> None:
        data = json.dumps(plan).encode()
        urllib.request.urlopen(urllib.request.Request(f"{self.endpoint}/__faults__", data, method="POST")).close()

    def done(self) -> dict[str, int]:
        with urllib.request.urlopen(f"{self.endpoint}/__faults__") as answer:
            return Counter(json.load(answer)["done"])


@contextmanager
def serve_fault_proxy(target: str) -> Iterator[FaultProxy]:
    """Runs the fault proxy in front of an S3 server, in a process of its own."""
    port = free_port()
    script = Path(__file__).with_name("fault_proxy.py")
    server = subprocess.Popen([sys.executable, script, "--port", str(port), "--target", target])
    try:
        _wait_for(f"http://127.0.0.1:{port}/__faults__", server)
        yield FaultProxy(f"http://127.0.0.1:{port}")
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="session")
def fault_proxy_server(s3_server: str) -> Iterator[FaultProxy]:
    """The fault proxy in front of the session's S3 server."""
    with serve_fault_proxy(s3_server) as proxy:
        yield proxy


@pytest.fixture
def fault_proxy(fault_proxy_server: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The fault proxy, without faults until its `plan` is called; this process's S3 goes through it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", fault_proxy_server.endpoint)
    fault_proxy_server.plan()
    yield fault_proxy_server
    fault_proxy_server.plan()


def _wait_for(endpoint: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(endpoint, timeout=1):
                return
        except OSError:
            assert server.poll() is None, "the S3 server has ended"
            time.sleep(0.1)
    raise TimeoutError("the S3 server does not answer")


@pytest.fixture
def single_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """S3's clients send each request once; what is repeated then, `smallcap.patience` repeats, and soon."""
    import s3fs

    from smallcap import patience
    from smallcap import s3 as s3_operations

    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    opened = s3_operations.s3_store
    monkeypatch.setattr(s3_operations, "s3_store", partial(opened, max_retries=0, timeout_s=1.0))
    real = storage.fsspec.filesystem

    def filesystem(protocol: str, **options: Any) -> Any:
        quick = {"retries": {"max_attempts": 0}, "read_timeout": 1, "connect_timeout": 1}
        return real(protocol, **options | ({"config_kwargs": quick} if protocol == "s3" else {}))

    monkeypatch.setattr(storage.fsspec, "filesystem", filesystem)
    for name in ("_FIRST_WAIT_S", "_LONGEST_WAIT_S"):
        monkeypatch.setattr(patience, name, 0.02)


@pytest.fixture
def s3(s3_server: str, request: pytest.FixtureRequest) -> str:
    """A bucket of this test's own, as `s3://NAME`."""
    import s3fs

    name = "test-" + "".join(letter if letter.isalnum() else "-" for letter in request.node.name.lower())[:50]
    fs = s3fs.S3FileSystem()
    if not fs.exists(name):
        fs.mkdir(name)
    return f"s3://{name}"


@pytest.fixture(params=["local", "s3"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder that does not exist yet, on the local disk and in a bucket."""
    return f"{tmp_path if request.param == 'local' else request.getfixturevalue('s3')}/anywhere"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hugging Face Hub of this test's own, for this process and those that it starts."""
    from huggingface_hub import constants

    with Hub().running() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        for name, value in {"HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}.items():
            monkeypatch.setenv(name, str(int(value)))
            monkeypatch.setattr(constants, name, value)  # the variable is read when the module is imported
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


@pytest.fixture(scope="session")
def ray_session(s3_server: str) -> Iterator[None]:
    """One local Ray with four logical CPUs for the whole test session."""
    import ray

    from jobs.cluster.session import connect

    connect("local")  # whatever runs on this machine
    _session_rays.append("local")
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def ray_where_it_is_marked(request: pytest.FixtureRequest) -> None:
    """Tests marked `ray` find the session's Ray running; no other one takes time and memory of this process's tests."""
    if request.node.get_closest_marker("ray"):
        request.getfixturevalue("ray_session")
    elif "ray" in sys.modules and not _session_rays:
        assert not sys.modules["ray"].is_initialized(), "something has started a Ray in this process"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With pytest-xdist, a file's tests run in one process; and all files on the session's Ray in one, where it is.

    Files whose tests start a Ray of their own run beside them: they wait for much of their time.

    Groups of `--dist=loadgroup` would say it, but pytest-xdist 3.8 loses them under pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return "ray" if _is_on_ray(config.rootpath / file) else file

    return Scheduler(config, log)


@lru_cache
def _is_on_ray(file: Path) -> bool:
    return "pytest.mark.ray" in file.read_text()


@pytest.fixture
def start_job() -> Iterator[StartJob]:
    """A function that starts a job as a process; what is left of it is killed when the test ends, also by a failure."""
    jobs: list[JobProcess] = []

    def start(command: Sequence[str | Path], log: Path, **environment: str) -> JobProcess:
        jobs.append(JobProcess(command, log, environment))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill_all()


@pytest.fixture
def publish_index(tmp_path: Path) -> PublishIndex:
    """A function that publishes an index of given vectors, texts and image ids without the builder.

    Call it as `publish_index(index_uri, vectors, texts, image_ids=None, shards=1)`, also with `index_key`, `nprobe`,
    `k_factor`, `removed` ids and the `encoder`'s identity.
    """

    def publish(
        index_uri: str,
        vectors: np.ndarray,
        texts: Sequence[str],
        image_ids: Sequence[list[str] | None] | None = None,
        shards: int = 1,
        **settings: Any,
    ) -> IndexManifest:
        staged = tmp_path / f"staged-{uuid.uuid4().hex}"
        manifest = write_version(staged, vectors, texts, image_ids or [None] * len(texts), shards, **settings)
        for entry in manifest.files:
            storage.upload(staged / entry.file, storage.join(index_uri, entry.file))
        storage.write_bytes(manifest_uri(index_uri, manifest.index_id), manifest.to_json().encode())
        write_pointer(index_uri, manifest.index_id)
        return manifest

    return publish


def write_version(
    folder: Path,
    vectors: np.ndarray,
    texts: Sequence[str],
    image_ids: Sequence[list[str] | None],
    shards: int,
    index_key: str = "Flat",
    nprobe: int | None = None,
    k_factor: int = 1,
    removed: Sequence[int] = (),
    encoder: EncoderIdentity | None = None,
) -> IndexManifest:
    """Writes the files of a version to a local folder, and returns its manifest."""
    import faiss
    import pyarrow as pa

    from smallcap.index.faiss_index import inverted_file_of, is_lossy

    rows, dim = vectors.shape
    folder.mkdir(parents=True)
    trained = faiss.deserialize_index(train_index(index_key, dim, vectors.tobytes()))
    inverted_file = inverted_file_of(trained)

    def write_shard(first: int, stop: int) -> Path:
        index = faiss.clone_index(trained)
        if inverted_file is None:
            index.add(vectors[first:stop])
        else:
            index.add_with_ids(vectors[first:stop], np.arange(first, stop))
        faiss.write_index(index, str(folder / f"{first}.faiss"))
        return folder / f"{first}.faiss"

    def write_captions(first: int, stop: int) -> Path:
        columns = [range(first, stop), texts[first:stop], [["dump.csv"]] * (stop - first), image_ids[first:stop]]
        fields = zip(columns, CAPTION_STORE_COLUMNS, strict=True)
        arrays = [pa.array(list(column), field.type) for column, field in fields]
        write_caption_file(folder / f"{first}.arrow", pa.record_batch(arrays, schema=CAPTION_STORE_COLUMNS))
        return folder / f"{first}.arrow"

    def write_vectors(first: int, stop: int) -> Path:
        np.save(folder / f"{first}.npy", vectors[first:stop].astype(np.float16))
        return folder / f"{first}.npy"

    template = FileEntry.adopt(write_shard(0, 0), folder, "template")
    writers = {"shard": write_shard, "captions": write_captions}
    if is_lossy(index_key):
        writers["vectors"] = write_vectors
    entries: dict[str, list[ShardEntry]] = {kind: [] for kind in ("shard", "captions", "vectors")}
    bounds = [rows * number // shards for number in range(shards + 1)]
    for first, stop in pairwise(bounds):
        for kind, write in writers.items():
            entry = ShardEntry.adopt(write(first, stop), folder, kind, first_id=first, rows=stop - first)
            entries[kind].append(entry)
    tombstones = None
    if removed:
        np.save(folder / "removed.npy", np.array(sorted(removed), np.int64))
        tombstones = RemovedEntry.adopt(folder / "removed.npy", folder, "removed", rows=len(removed))
    per_image = Counter(image for images in image_ids for image in images or [])
    return IndexManifest(
        encoder=encoder or EncoderIdentity(spec="hf:test", weights_sha256="0" * 64, dim=dim),
        dim=dim,
        index_key=index_key,
        nlist=None if inverted_file is None else inverted_file.nlist,
        nprobe=nprobe,
        k_factor=k_factor,
        template=template,
        shards=tuple(entries["shard"]),
        captions=tuple(entries["captions"]),
        vectors=tuple(entries["vectors"]),
        removed=tombstones,
        max_captions_per_image=max(per_image.values(), default=0),
        sources=(SourceEntry(uri="dump.csv", name="dump.csv", rows=len(texts), sha256="0" * 64),),
        filters={},
        dropped={},
        builder_version="0",
        created_at="2026-01-01T00:00:00+00:00",
    ).with_index_id()


@lru_cache
def train_index(index_key: str, dim: int, vectors: bytes) -> np.ndarray:
    """Returns a trained, empty index, serialized: many tests train the same one."""
    import faiss

    return faiss.serialize_index(train_quickly(index_key, np.frombuffer(vectors, np.float32).reshape(-1, dim)))


def train_quickly(index_key: str, vectors: np.ndarray) -> Any:
    """Returns an index trained as the builder does, but for a rotation of few steps (OPQ: fifty, half a minute)."""
    index = make_index(index_key, vectors.shape[1])
    for transform in transforms_of(index):
        transform.niter = 2
    index.train(vectors)
    return index


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; the test is skipped where there is none."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data folder ../shared/data is absent")
    return folder
