"""Lineage: the events of a job reach an HTTP sink with what the job reads and writes, and never cost a run."""

import json
import os
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from jobs import cli, lineage
from jobs.cluster.stopping import Stopped
from jobs.lineage import Data, Flow
from jobs.terminal.call_options import CaptionCall
from smallcap.config import CaptionConfig, IndexConfig
from smallcap.errors import ConfigError, StorageError
from smallcap.training.config import TrainConfig

GOLDEN = Path(__file__).parents[1] / "golden"
FLOW = Flow((Data("s3://bucket/images"),), (Data("s3://bucket/captions"),))


class Sink:
    """The bodies that were posted, and the status that the sink answers."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.status = 201
        self.was_running = Event()

    def take(self, body: bytes) -> None:
        self.events.append(json.loads(body))
        if self.events[-1]["eventType"] == "RUNNING":
            self.was_running.set()

    @property
    def states(self) -> list[str]:
        return [event["eventType"] for event in self.events]


@pytest.fixture
def sink(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sink]:
    """A local OpenLineage backend, to which the client's environment points."""
    pytest.importorskip("openlineage.client", reason="the extra `lineage` is not installed")
    sink = Sink()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/api/v1/lineage":
                sink.take(body)
            self.send_response(sink.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENLINEAGE_URL", f"http://127.0.0.1:{server.server_address[1]}")
    yield sink
    server.shutdown()
    server.server_close()
    for name in [name for name in os.environ if name.startswith("OPENLINEAGE__")]:  # which the client writes there
        del os.environ[name]


def test_a_job_that_ends_sends_start_running_and_complete_of_one_run(sink: Sink) -> None:
    with lineage.reported("caption", lambda: FLOW, True, every_s=0.01):
        assert sink.was_running.wait(60)
    assert sink.states[0] == "START"
    assert sink.states[-1] == "COMPLETE"
    assert set(sink.states[1:-1]) == {"RUNNING"}
    assert len({event["run"]["runId"] for event in sink.events}) == 1
    assert {event["job"]["name"] for event in sink.events} == {"caption s3://bucket/captions"}
    (dataset,) = sink.events[0]["inputs"]
    assert (dataset["namespace"], dataset["name"]) == ("s3://bucket", "images")
    assert all(event["producer"].endswith("/smallcap") for event in sink.events)


@pytest.mark.parametrize(
    ("error", "state"),
    [(StorageError("The disk is full."), "FAIL"), (Stopped("Stopped.", 15), "ABORT"), (KeyboardInterrupt(), "ABORT")],
    ids=["error", "signal", "interrupt"],
)
def test_a_job_that_fails_or_is_stopped_says_why(sink: Sink, error: BaseException, state: str) -> None:
    with pytest.raises(type(error)), lineage.reported("caption", lambda: FLOW, True):
        raise error
    assert sink.states == ["START", state]
    message = sink.events[-1]["run"]["facets"]["errorMessage"]["message"]
    assert message == (str(error) or "KeyboardInterrupt")
    assert "errorMessage" not in sink.events[0]["run"]["facets"]


def test_a_captioning_run_names_index_version_model_and_output(sink: Sink) -> None:
    record = json.loads((GOLDEN / "run_v1" / "_run.json").read_text())
    out = str(GOLDEN / "run_v1")
    config = CaptionConfig(images=("s3://bucket/a", "/b"), index="s3://bucket/index", model="Yova/SmallCap7M", out=out)
    with lineage.reported("caption", lambda: lineage.caption_flow(config), True):
        pass
    ended = sink.events[-1]
    found = {(data["namespace"], data["name"]): data["facets"].get("version") for data in ended["inputs"]}
    assert set(found) == {
        *(("s3://bucket", "a"), ("file", "/b"), ("s3://bucket", "index"), ("hf://models", "Yova/SmallCap7M"))
    }
    assert found["s3://bucket", "index"]["datasetVersion"] == record["index_id"]
    assert found["hf://models", "Yova/SmallCap7M"]["datasetVersion"] == record["model_id"]
    (written,) = ended["outputs"]
    assert (written["namespace"], written["name"]) == ("file", out)
    assert written["facets"]["version"]["datasetVersion"] == record["run_id"]
    assert written["outputFacets"]["outputStatistics"]["rowCount"] == record["images"]["total"]
    tags = {tag["key"]: tag["value"] for tag in ended["run"]["facets"]["tags"]["tags"]}
    assert tags["errors"] == str(record["images"]["error"])
    assert tags["status"] == record["status"]


def test_variants_name_the_folder_of_all_and_the_output_of_each(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "run_v1", tmp_path / "out" / "plain")
    config = CaptionConfig(images=("/b",), index="/index", model="demo", out=str(tmp_path / "out"))
    flow = lineage.variants_flow(config, ("plain", "k0:k=0"))
    assert [data.place for data in flow.outputs] == [f"{tmp_path}/{name}" for name in ("out", "out/plain", "out/k0")]
    assert [data.place for data in flow.inputs].count("/b") == 1
    assert flow.properties["plain: status"] == "complete"


def test_a_build_names_the_version_that_is_current() -> None:
    index = GOLDEN / "index_v1" / "index"
    flow = lineage.build_flow(IndexConfig(dumps=("captions.csv",), out=str(index), encoder="hf:clip"))
    (written,) = flow.outputs
    assert written.version == json.loads((index / "current.json").read_text())["index_id"]
    assert [data.place for data in flow.inputs] == ["captions.csv"]


def test_training_names_what_it_starts_from_before_there_is_a_record(tmp_path: Path) -> None:
    config = TrainConfig(sources=("pairs.json",), index="/index", model="Yova/SmallCap7M", out=str(tmp_path / "out"))
    flow = lineage.train_flow(config)
    assert [data.place for data in flow.inputs] == ["pairs.json", "/index", "Yova/SmallCap7M"]
    assert [(data.place, data.version) for data in flow.outputs] == [(str(tmp_path / "out" / "model"), None)]


@pytest.mark.parametrize(
    ("place", "named"),
    [
        ("s3://bucket/a/b/", ("s3://bucket", "a/b")),
        ("s3://bucket", ("s3://bucket", "/")),
        ("https://user:secret@host:8443/list.csv?X-Amz-Signature=secret", ("https://host:8443", "list.csv")),
        ("file:///data/x", ("file", "/data/x")),
        ("/data/x", ("file", "/data/x")),
        ("hf://datasets/a/b", ("hf://datasets", "a/b")),
        ("Yova/SmallCap7M", ("hf://models", "Yova/SmallCap7M")),
    ],
    ids=["s3", "bucket", "secret", "file", "path", "hub", "model"],
)
def test_places_are_named_as_openlineage_has_them_and_without_secrets(place: str, named: tuple[str, str]) -> None:
    assert Data(place).named() == named


def test_events_that_are_refused_are_said_once_and_cost_nothing(sink: Sink, capsys: pytest.CaptureFixture[str]) -> None:
    sink.status = 400
    with lineage.reported("caption", lambda: FLOW, True, every_s=0.01):
        assert sink.was_running.wait(60)
    assert capsys.readouterr().err.count("An OpenLineage event could not be sent") == 1


def test_it_is_off_by_default(sink: Sink) -> None:
    assert not CaptionCall().lineage
    with lineage.reported("caption", lambda: FLOW, CaptionCall().lineage):
        pass
    assert sink.events == []


def test_settings_that_are_missing_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openlineage.client", reason="the extra `lineage` is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with (
        pytest.raises(ConfigError, match="where events about lineage go"),
        lineage.reported("train", lambda: FLOW, True),
    ):
        pass


def test_a_client_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lineage, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as raised, lineage.reported("train", lambda: FLOW, True):
        pass
    assert "smallcap[lineage]" in raised.value.remedy


def test_the_command_reports_its_job(sink: Sink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: CaptionConfig, *_: Any, **__: Any) -> None:
        raise StorageError("There is no such bucket.", where=config.images[0])

    monkeypatch.setattr("jobs.caption.run", fail)
    config = CaptionConfig(images=("s3://bucket/a",), index="/index", model="demo", out=str(tmp_path / "out"))
    with pytest.raises(StorageError):
        cli.caption(config, CaptionCall(lineage=True))
    assert sink.states == ["START", "FAIL"]
    assert sink.events[-1]["outputs"][0]["name"] == str(tmp_path / "out")
