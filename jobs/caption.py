"""The captioning job: images in, Parquet with captions and retrieved neighbours out.

    list → drop what is done → fetch and decode (CPU tasks) → caption (actor pool) → write parts

Runs as `smallcap caption …` or, for `ray job submit`, as `python -m jobs.caption --config FILE --set a.b=c`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from jobs.config_args import run_job
from jobs.run_record import (
    RUN_FORMAT_VERSION,
    Attempt,
    ImageCounts,
    RunRecord,
    count_images,
    drop_duplicates,
    finished_ids,
    load_run_record,
    run_lock,
    write_run_record,
)
from smallcap.actor_plan import plan_actors
from smallcap.captioner import CropPlan
from smallcap.checkpoint import checkpoint_id
from smallcap.clip_encoder import resolve_encoder_identity
from smallcap.config import CaptionConfig
from smallcap.dataset import list_images
from smallcap.index_manifest import load_manifest, utc_now
from smallcap.precision import fastest_cpu_dtype
from smallcap.schema import caption_schema

if TYPE_CHECKING:
    from jobs.retrieval_actors import Partitions

_IMAGES_PER_BLOCK = 256
# A block's files, its crops, and one large image being decoded. It also makes the task unlike an actor of one CPU, into
# which Ray would otherwise fuse it.
_DECODE_MEMORY_BYTES = 512 << 20
_CPU_BATCH, _GPU_BATCH = 64, 256  # images
_BATCHES_PER_CALL = {"cpu": 1, "cuda": 4}  # on a GPU an actor prepares its next batch while it decodes one


@dataclass(frozen=True)
class RunSummary:
    """What a call of the job did, and what its output folder now holds."""

    out: str
    record: RunRecord
    new_images: int  # captioned, or failed, by this call
    images: ImageCounts  # in the output, of all attempts


def run(config: CaptionConfig, address: str | None = None) -> RunSummary:
    """Captions all images of `config` that have no row in its output yet.

    Args:
        config: What to caption, with what, and where to write.
        address: Of a Ray cluster; by default the one this process belongs to, or a new local one.

    Returns:
        The finished run. When everything was done before, nothing is computed and Ray is not started.

    Raises:
        ConfigError: The options are wrong, or the output holds a run with others.
        RunError: Storage, index or checkpoint cannot be used.
    """
    with run_lock(config.out):
        record = _open_record(config)
        todo = _images_to_do(config)
        if todo.num_rows:
            record = _caption(config, record, todo, address)
        if record.status != "complete":
            drop_duplicates(config.out)
            record = record.model_copy(update={"status": "complete", "images": count_images(config.out)})
            write_run_record(config.out, record)
    return RunSummary(config.out, record, todo.num_rows, record.images)


def describe(summary: RunSummary) -> str:
    """Returns what a call of the job did and where its time went, in a few lines for people."""
    images = summary.images
    lines = [f"Nothing to do: all {images.total:,} images have their rows already."]
    if summary.new_images:
        attempt = summary.record.attempts[-1]
        lines = _describe_attempt(attempt, summary.new_images)
    errors = ", ".join(f"{count:,} {code}" for code, count in images.errors_by_code.items())
    counts = f"{images.total:,} rows: {images.ok:,} ok, {images.error:,} errors"
    lines.append(counts + (f" ({errors})" if errors else ""))
    lines.append(f"Parquet: {summary.out}/part-*.parquet")
    return "\n".join(lines)


def _describe_attempt(attempt: Attempt, images: int) -> list[str]:
    """Says an attempt's rate, its stages' own rates, and which of them holds the others up."""
    assert attempt.seconds and attempt.decode_s and attempt.caption_s and attempt.actors
    busy = attempt.caption_s / attempt.actors / attempt.seconds
    verdict = "captioning is the bottleneck" if busy > 0.5 else "starting up, reading and writing took most of the time"
    actor = f"one {attempt.device} actor, {attempt.dtype or ''}"
    search = f", search: {' and '.join(attempt.search_backends)}" if attempt.search_backends else ""
    fallbacks = "" if attempt.decoded_by_pillow is None else f", {attempt.decoded_by_pillow:,} whole by Pillow"
    return [
        f"Captioned {images:,} images in {attempt.seconds:.1f} s, {images / attempt.seconds:.1f} images/s:",
        f"  fetch and decode  {images / attempt.decode_s:8,.1f} images/s in one CPU task{fallbacks}",
        f"  caption           {images / attempt.caption_s:8,.1f} images/s in {actor}{search}",
        f"  {attempt.actors} actor(s) busy {busy:.0%} of the time: {verdict}",
    ]


def _open_record(config: CaptionConfig) -> RunRecord:
    """Continues the output folder's run, or begins one; pins the index's version for all attempts."""
    model_id = checkpoint_id(config.model)
    record = load_run_record(config.out)
    if record is not None:
        record.check_same_run(config, model_id, config.out)
        return record
    manifest = load_manifest(config.index) if config.index and config.retrieval.k != 0 else None
    encoder = config.retrieval.encoder or (manifest.encoder.spec if manifest else None)
    if manifest and encoder:
        manifest.check_encoder(resolve_encoder_identity(encoder), config.index or "")
    return RunRecord.new(config, model_id, manifest.index_id if manifest else None, encoder)


def _images_to_do(config: CaptionConfig) -> pa.Table:
    """Lists the images that have no row in the output, sorted by id."""
    images = list_images(config.images, config.input)
    if config.limit is not None:
        images = images.slice(0, config.limit)
    done = pc.is_in(images["image_id"], value_set=finished_ids(config.out))
    return images.filter(pc.invert(done))


def _caption(config: CaptionConfig, record: RunRecord, todo: pa.Table, address: str | None) -> RunRecord:
    """Runs one attempt of the pipeline over the images to do."""
    import ray

    from index_builder.tasks import node_resources
    from jobs.ray_session import connect, own_errors, stage_progress
    from jobs.stages import CaptionerSpec, CaptionImages, PartSink, fetch_and_decode

    connect(address)
    pool = plan_actors(config.compute, node_resources())
    if pool.device == "cpu" and config.compute.dtype == "auto":
        pool = replace(pool, dtype=_cpu_dtype(record))
    attempt = Attempt(
        started_at=utc_now(), images=todo.num_rows, actors=pool.num_actors, device=pool.device, dtype=pool.dtype
    )
    record = record.model_copy(update={"status": "running", "format_version": RUN_FORMAT_VERSION})
    write_run_record(config.out, record.model_copy(update={"attempts": (*record.attempts, attempt)}))

    schema = caption_schema(record.run_id, record.model_id, record.index_id or "", record.schema_version)
    sink = PartSink(
        config.out, schema, len(record.attempts), config.output.rows_per_part, config.output.rows_per_row_group
    )
    plan = CropPlan.load(config.model, record.retrieval_encoder, config.input.decode)
    batch_size = _batch_size(config, pool.device)
    spec = CaptionerSpec(config, pool.device, pool.dtype, record.index_id, record.retrieval_encoder, batch_size)

    started = time.perf_counter()
    with own_errors(), stage_progress(), _partitions(config, record) as partitions:
        spec = replace(spec, partitions=partitions)
        (
            ray.data.from_arrow(todo)
            .repartition(target_num_rows_per_block=_IMAGES_PER_BLOCK)
            .map_batches(
                fetch_and_decode,
                batch_size=_IMAGES_PER_BLOCK,
                fn_kwargs={"plan": plan, "max_pixels": config.input.max_image_pixels},
                memory=_DECODE_MEMORY_BYTES,
            )
            .map_batches(
                CaptionImages,
                fn_constructor_args=(spec,),
                batch_size=batch_size * _BATCHES_PER_CALL[pool.device],
                compute=ray.data.ActorPoolStrategy(size=pool.num_actors),
                num_cpus=pool.cpus_per_actor,
                num_gpus=pool.gpus_per_actor,
            )
            .write_datasink(sink)
        )
    attempt = attempt.model_copy(
        update={
            "finished_at": utc_now(),
            "seconds": round(time.perf_counter() - started, 3),
            "decode_s": round(sink.totals.decode_s, 3),
            "caption_s": round(sink.totals.caption_s, 3),
            "decoded_by_pillow": sink.totals.by_pillow if config.input.decode == "fast" else None,
            "search_backends": tuple(sorted(sink.totals.searched_by)),
        }
    )
    return record.model_copy(update={"attempts": (*record.attempts, attempt)})


@contextmanager
def _partitions(config: CaptionConfig, record: RunRecord) -> Iterator[Partitions | None]:
    """Runs the actors that hold the index between them, where one process is not to hold all of it."""
    from jobs.retrieval_actors import run_partitions

    if record.index_id is None or config.index is None or config.retrieval.partitions == 1:
        yield None
        return
    with run_partitions(config.index, record.index_id, config.retrieval) as partitions:
        yield partitions


def _cpu_dtype(record: RunRecord) -> str:
    """Returns what `auto` means on CPU actors: what earlier attempts of the run took, else what a worker measures."""
    import ray

    earlier = [attempt.dtype for attempt in record.attempts if attempt.device == "cpu" and attempt.dtype]
    if earlier:
        return earlier[0]
    dtype: str = ray.get(ray.remote(_measure_cpu_dtype).remote())
    return dtype


def _measure_cpu_dtype() -> str:
    """Runs on a worker; Ray takes no cached function."""
    return fastest_cpu_dtype()


def _batch_size(config: CaptionConfig, device: str) -> int:
    if config.compute.batch_size != "auto":
        return config.compute.batch_size
    return _GPU_BATCH if device == "cuda" else _CPU_BATCH


if __name__ == "__main__":
    run_job(CaptionConfig, lambda config, address: describe(run(config, address)))
