"""Tells an OpenLineage backend what a job reads and writes, through OpenLineage's own client; off by default.

A job's events are START, RUNNING every few minutes, and COMPLETE, FAIL or, where a signal stopped it, ABORT. Each says
what is known by then: a record is read anew for every event. The client's own settings (OPENLINEAGE_URL, or
`openlineage.yml`) say where events go. No event may cost a run: what goes wrong with them is said once.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import starmap, zip_longest
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from jobs.screen import note
from smallcap import __version__, storage
from smallcap.config import CaptionConfig, IndexConfig
from smallcap.errors import ConfigError
from smallcap.index.manifest import split_index_ids, utc_now
from smallcap.phrasing import one_line
from smallcap.redaction import hide_secrets
from smallcap.variant_options import make_variants

if TYPE_CHECKING:
    from openlineage.client.event_v2 import RunEvent

    from smallcap.training.config import TrainConfig

State = Literal["START", "RUNNING", "COMPLETE", "FAIL", "ABORT"]

_RUNNING_EVERY_S = 300.0
_PRODUCER = "pkg:pypi/smallcap"  # a package URL
_NAMESPACE = "smallcap"  # of the jobs


@dataclass(frozen=True)
class Data:
    """Something that a job reads or writes.

    Attributes:
        place: A path, a URI, or the name of a model on the Hugging Face Hub.
        version: What identifies its content, if it is known: of an index its version, of a model its fingerprint.
        rows: How many rows it has, if that is known.
    """

    place: str
    version: str | None = None
    rows: int | None = None

    def named(self) -> tuple[str, str]:
        """Returns namespace and name as OpenLineage's naming has them, without what may be secret in a URI."""
        if storage.is_local(self.place):
            path = storage.absolute(self.place)
            is_path = self.place.startswith(("/", ".", "~", "file://")) or storage.exists(path)
            return ("file", path) if is_path else ("hf://models", self.place)
        parts = urlsplit(self.place)
        port = f":{parts.port}" if parts.port else ""
        return f"{parts.scheme}://{parts.hostname or ''}{port}", parts.path.strip("/") or "/"


@dataclass(frozen=True)
class Flow:
    """What a job reads and writes, as far as it is known."""

    inputs: tuple[Data, ...]
    outputs: tuple[Data, ...]
    properties: dict[str, str] = field(default_factory=dict)  # of the run, for people


def caption_flow(config: CaptionConfig) -> Flow:
    """Returns what a captioning run reads and writes, with what its record says by now."""
    from jobs.captioning.record import load_run_record

    record = load_run_record(config.out)
    indexes = zip_longest(config.index, split_index_ids(record.index_id if record else None))
    return Flow(
        inputs=(
            *map(Data, config.images),
            *starmap(Data, indexes),
            Data(config.model, record.model_id if record else None),
        ),
        outputs=(Data(config.out, record.run_id if record else None, record.images.total if record else None),),
        properties={"errors": str(record.images.error), "status": record.status} if record else {},
    )


def variants_flow(config: CaptionConfig, texts: Sequence[str]) -> Flow:
    """Returns what a run of variants reads and writes: the folder of all, and in it the output of each."""
    variants = make_variants(config, texts)
    flows = [caption_flow(variant.config) for variant in variants]
    return Flow(
        inputs=tuple(dict.fromkeys(data for flow in flows for data in flow.inputs)),
        outputs=(Data(config.out), *(data for flow in flows for data in flow.outputs)),
        properties={
            f"{variant.name}: {name}": text
            for variant, flow in zip(variants, flows, strict=True)
            for name, text in flow.properties.items()
        },
    )


def build_flow(config: IndexConfig) -> Flow:
    """Returns what a build reads and writes; the version of the index is the one that is current now."""
    from index_builder.versions.publish import load_current

    current = load_current(config.out)
    return Flow(
        inputs=(*map(Data, config.dumps), *map(Data, config.from_indexes)),
        outputs=(Data(config.out, current.index_id if current else None, current.ntotal if current else None),),
        properties={"encoder": current.encoder.spec} if current else {},
    )


def train_flow(config: TrainConfig) -> Flow:
    """Returns what training reads and writes, with what its record says by now."""
    from jobs.training.record import load_train_record

    record = load_train_record(config.out)
    start = (config.model,) if config.model else (config.vision_encoder, config.decoder)
    index = () if config.index is None else (Data(config.index, record.index_id if record else None),)
    return Flow(
        inputs=(*map(Data, config.sources), *index, *(Data(name) for name in start if name)),
        outputs=(Data(storage.join(config.out, "model"), record.run_id if record else None),),
        properties={"start": record.start_id, "status": record.status} if record else {},
    )


@contextmanager
def reported(job: str, flow: Callable[[], Flow], is_wanted: bool, every_s: float = _RUNNING_EVERY_S) -> Iterator[None]:
    """Sends the events of a job while the block runs.

    Args:
        job: The command's name.
        flow: Returns what is known of the job now.
        is_wanted: Whether events are sent.
        every_s: Seconds between two RUNNING events.

    Raises:
        ConfigError: Events are wanted, and the client is not installed or has no settings.
    """
    if not is_wanted:
        yield
        return
    sender = _Sender(job, flow)
    sender.send("START")
    ended = Event()

    def send_running() -> None:
        while not ended.wait(every_s):
            sender.send("RUNNING")

    running = Thread(target=send_running, name="lineage", daemon=True)
    running.start()

    def end(state: State, error: BaseException | None = None) -> None:
        ended.set()
        running.join()  # after its end a run has no further event
        sender.send(state, error)

    try:
        yield
    except Exception as error:
        end("FAIL", error)
        raise
    except BaseException as error:  # a signal
        end("ABORT", error)
        raise
    end("COMPLETE")


class _Sender:
    """Sends the events of one run."""

    def __init__(self, job: str, flow: Callable[[], Flow]) -> None:
        if find_spec("openlineage") is None:
            raise ConfigError(
                "Events about lineage need the client of OpenLineage, which is not installed.",
                where="--lineage",
                remedy="pip install 'smallcap[lineage]'",
            )
        from openlineage.client import OpenLineageClient

        try:
            self._client = OpenLineageClient()
        except Exception as error:  # each transport has its own
            raise ConfigError(
                "The settings of OpenLineage cannot be used.",
                where="--lineage",
                found=str(error),
                remedy="Set OPENLINEAGE_URL, or mend openlineage.yml.",
            ) from error
        if self._client.transport.kind == "console" and not self._client.config.transport.get("type"):
            raise ConfigError(
                "Nothing says where events about lineage go.",
                where="--lineage",
                expected="OPENLINEAGE_URL, or a file openlineage.yml here or in ~/.openlineage",
            )
        self._job, self._flow, self._run_id, self._failed = job, flow, str(uuid.uuid4()), False

    def send(self, state: State, error: BaseException | None = None) -> None:
        """Sends an event; a failure is said once, and the job goes on."""
        try:
            self._client.emit(self._event(state, error))
        except Exception as failure:  # noqa: BLE001 - no event may cost a run
            if not self._failed:
                note(f"An OpenLineage event could not be sent; the job goes on without: {one_line(str(failure))}")
            self._failed = True
        if state in ("COMPLETE", "FAIL", "ABORT"):
            with suppress(Exception):
                self._client.close(timeout=10)

    def _event(self, state: State, error: BaseException | None) -> RunEvent:
        from openlineage.client.event_v2 import Job, Run, RunEvent, RunState
        from openlineage.client.facet_v2 import error_message_run, job_type_job, processing_engine_run, tags_run

        flow = self._flow()
        facets: dict[str, Any] = {
            "processing_engine": processing_engine_run.ProcessingEngineRunFacet(version=__version__, name="smallcap"),
        }
        if flow.properties:
            tags = [tags_run.TagsRunFacetFields(*item, "smallcap") for item in flow.properties.items()]
            facets["tags"] = tags_run.TagsRunFacet(tags=tags)
        if error is not None:
            message = error_message_run.ErrorMessageRunFacet(hide_secrets(str(error)) or type(error).__name__, "python")
            facets["errorMessage"] = message
        kind = job_type_job.JobTypeJobFacet(processingType="BATCH", integration="SMALLCAP", jobType="JOB")
        return RunEvent(
            eventType=RunState[state],
            eventTime=utc_now(),
            producer=_PRODUCER,
            run=Run(self._run_id, facets),
            job=Job(_NAMESPACE, f"{self._job} {'/'.join(flow.outputs[0].named())}", {"jobType": kind}),
            inputs=[_input(data) for data in flow.inputs],
            outputs=[_output(data) for data in flow.outputs],
        )


def _version(data: Data) -> dict[str, Any]:
    from openlineage.client.facet_v2 import dataset_version_dataset

    return {"version": dataset_version_dataset.DatasetVersionDatasetFacet(data.version)} if data.version else {}


def _input(data: Data) -> Any:
    from openlineage.client.event_v2 import InputDataset

    return InputDataset(*data.named(), facets=_version(data))


def _output(data: Data) -> Any:
    from openlineage.client.event_v2 import OutputDataset
    from openlineage.client.facet_v2 import output_statistics_output_dataset as statistics

    rows = (
        {"outputStatistics": statistics.OutputStatisticsOutputDatasetFacet(data.rows)} if data.rows is not None else {}
    )
    return OutputDataset(*data.named(), facets=_version(data), outputFacets=rows)
