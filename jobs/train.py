"""The training job: takes images with captions and an index, and writes a checkpoint with trained cross-attention.

    list → store features (once per image) → store candidates (from the index) → train (Ray Train) → write the model

Runs as `smallcap train …`, also under `ray job submit`, or as `python -m jobs.train …` with the same options. What an
earlier attempt has finished is not done again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from jobs.captioning.record import run_lock
from jobs.cluster.addresses import check_address
from jobs.cluster.display import Display, on_shown_ray
from jobs.cluster.metrics import marked_as_running
from jobs.cluster.pinned import (
    check_indexes_are_there,
    check_required_index,
    check_required_model,
    pin_indexes,
    pinned_encoder,
)
from jobs.cluster.stopping import GOES_ON, stoppable
from jobs.screen import detail
from jobs.training.inputs import LISTS_FOLDER, TrainInputs, list_inputs
from jobs.training.record import (
    RECORD_FILE,
    TrainAttempt,
    TrainData,
    TrainRecord,
    choose_best,
    load_train_record,
    write_train_record,
)
from jobs.training.start import ModelStart
from smallcap import storage
from smallcap.errors import ConfigError, RunError
from smallcap.images.crops import CropPlan
from smallcap.index.manifest import join_index_ids, load_manifest, utc_now
from smallcap.model.encoder_spec import load_preprocessing
from smallcap.model.files import checkpoint_sha256
from smallcap.phrasing import describe_count, describe_counts
from smallcap.training.checkpoints import find_train_checkpoint
from smallcap.training.config import TrainConfig
from smallcap.training.example_stream import ExampleStream
from smallcap.training.feature_store import Split, StoreManifest

if TYPE_CHECKING:
    from jobs.training.fit import TrainPlan
    from jobs.training.loop import WorkerSpec
    from smallcap.model.checkpoint import SmallCapModel


@dataclass(frozen=True)
class TrainSummary:
    """What a call of the job did, and what its output folder now holds."""

    out: str
    record: TrainRecord
    new_steps: int  # that this call trained


def run(config: TrainConfig, address: str | None = None) -> TrainSummary:
    """Trains to the end, from where an earlier attempt in the same folder stopped.

    Args:
        config: What to train on, what to start from, and where to write.
        address: Address of a Ray cluster; see `jobs.cluster.session.connect` for the default.

    Returns:
        The finished run. Where everything is done already, nothing is computed and Ray does not start.

    Raises:
        ConfigError: The options are wrong, or the output holds a run with other options.
        RunError: Storage, index or a model cannot be used.
        Stopped: A signal came; a checkpoint is kept.
    """
    with run_lock(config.out, RECORD_FILE, LISTS_FOLDER), stoppable() as signals, Display(signals) as display:
        try:
            record, start = open_record(config)
            if record.status == "complete":
                return TrainSummary(config.out, record, 0)
            check_address(address)  # before what may take long
            # before Ray and torch are loaded: what is wrong is told at once
            with display.activity(f"Listing the images of {', '.join(config.sources)}"):
                inputs = list_inputs(config, config.out)
            with (
                on_shown_ray(display, address, partial(_describe_kept, config.out)),  # before Ray Data reads settings
                marked_as_running(config.out, "train"),
            ):
                return _train(config, record, start, inputs, display)
        except KeyboardInterrupt:
            raise signals.stopped(_record_stop(config.out)) from None


def _record_stop(out: str) -> str:
    """Writes into a run's record that it was stopped; returns what to tell who has stopped it."""
    record, newest = load_train_record(out), find_train_checkpoint(out)
    if record is not None and record.status == "running":
        write_train_record(out, record.model_copy(update={"status": "stopped"}))
    if record is None or newest is None:
        return f"Stopped before the first checkpoint; {GOES_ON}"
    return f"Stopped: {newest.step:,} of {record.steps or newest.step:,} steps are in a checkpoint; {GOES_ON}"


def open_record(config: TrainConfig) -> tuple[TrainRecord, ModelStart]:
    """Continues the output folder's run, or begins one; pins the index's version and the start for all attempts.

    Raises:
        ConfigError: The folder holds a run with other options, or the index or the model is not the required one.
        RunError: The index or the model cannot be used.
    """
    record = load_train_record(config.out)
    indexes = [config.index] if config.index is not None else []
    k, cache_dir = config.retrieval.k, config.retrieval.cache_dir
    check_required_index(config.require_index_id, indexes, k, record.index_id if record else None)
    check_required_model(config.require_model_hash, config.model, cache_dir)
    if record is not None:
        record = record.model_copy(update={"retrieval_encoder": pinned_encoder(record, config.out)})
        start = ModelStart(config, record.retrieval_encoder)
        record.check_same_run(config, start.model_id)
        if record.status != "complete":
            check_indexes_are_there(record, indexes)
        return record, start
    manifests, encoder = pin_indexes(indexes, k, config.retrieval_encoder, cache_dir)
    index_id, start = join_index_ids(manifests) or None, ModelStart(config, encoder)
    pinned = {"start_id": start.model_id()}
    if config.model:
        pinned["start_sha256"] = checkpoint_sha256(config.model, cache_dir)
    return TrainRecord.new(config, index_id, encoder, **pinned), start


def _describe_kept(out: str) -> str:
    newest = find_train_checkpoint(out)
    if newest is None:
        return f"Features and candidates that were stored are kept below {out}."
    return f"The checkpoint after step {newest.step:,} is kept in {out}."


def _train(
    config: TrainConfig, record: TrainRecord, start: ModelStart, inputs: TrainInputs, display: Display
) -> TrainSummary:
    """Runs one attempt of all stages."""
    from jobs.training.candidates import count_leaks, store_candidates
    from jobs.training.features import VisionSide, store_features
    from jobs.training.fit import check_installed, plan_training
    from jobs.training.loop import WorkerSpec
    from smallcap.training.objective import frozen_sha256

    check_installed()
    plan = plan_training(config, record.dtype)
    detail(f"Plan: {describe_count(plan.workers, 'worker')} on {plan.device} in {plan.dtype}")
    with display.activity("Loading the model"):
        model = start.load()
    record = record.model_copy(
        update={
            "status": "running",
            "frozen_sha256": frozen_sha256(model, model.decoder),
            "trained_parameters": sum(p.numel() for p in model.decoder.cross_attention_parameters().values()),
        }
    )
    write_train_record(config.out, record)
    folders = (config.features or storage.join(config.out, "features"), storage.join(config.out, "candidates"))
    vision = VisionSide(_crop_plan(model, start), _vision_sha256(model))
    with display.activity("Encoding images", "image") as activity:
        features = store_features(config, start, inputs, vision, folders[0], activity)
    leaks = None
    if record.index_id is not None:
        with display.activity("Searching for captions of the images", "image") as activity:
            manifest = load_manifest(config.index or "", record.index_id)
            store_candidates(config, manifest, features, folders, activity)
        leaks = record.data.leaks if record.data else count_leaks(features, folders)
    streams = [_stream(config, features, folders, split) for split in ("train", "validation")]
    record = record.model_copy(
        update={
            "dtype": plan.dtype,
            "data": _describe_data(features, inputs, leaks),
            "steps": streams[0].batches_per_epoch * config.optimizer.epochs,
        }
    )
    spec = WorkerSpec(config, start, plan.dtype, streams[0], streams[1])
    record, new_steps = _fit(config, record, spec, plan, display)
    with display.activity("Writing the model"):
        record = _finish(config, record, start)
    return TrainSummary(config.out, record, new_steps)


def _fit(
    config: TrainConfig, record: TrainRecord, spec: WorkerSpec, plan: TrainPlan, display: Display
) -> tuple[TrainRecord, int]:
    """Trains the remaining steps; returns the record with this attempt, and how many steps it took."""
    if not spec.examples.examples:
        raise ConfigError(
            "There are no examples to train on.",
            where=", ".join(config.sources),
            expected="images that can be read, with captions",
            found=f"errors: {record.data.errors if record.data else {}}",
        )
    from jobs.training.fit import fit

    newest = find_train_checkpoint(config.out)
    attempt = TrainAttempt(
        started_at=utc_now(), device=plan.device, workers=plan.workers, first_step=newest.step if newest else 0
    )
    attempts = (*record.attempts, attempt)
    record = record.model_copy(update={"attempts": attempts})
    write_train_record(config.out, record)
    started = time.perf_counter()
    fit(spec, plan, record.run_id, display)
    finished = attempt.model_copy(update={"finished_at": utc_now(), "seconds": round(time.perf_counter() - started, 3)})
    new_steps = (record.steps or 0) - attempt.first_step
    return record.model_copy(update={"attempts": (*attempts[:-1], finished)}), new_steps


def _finish(config: TrainConfig, record: TrainRecord, start: ModelStart) -> TrainRecord:
    """Writes the model of the best epoch, and then the record that says so."""
    from jobs.training.export import write_model

    last = find_train_checkpoint(config.out)
    if last is None or len(last.epochs) != config.optimizer.epochs:
        raise RunError("Training ended without its last checkpoint.", where=config.out)
    best, selected_by = choose_best(last.epochs)
    after, sha256 = write_model(config.out, start, best.step, record.frozen_sha256 or "")
    record = record.model_copy(
        update={
            "status": "complete",
            "epochs": last.epochs,
            "best_epoch": best.epoch,
            "selected_by": selected_by,
            "frozen_sha256_after": after,
            "model_sha256": sha256,
        }
    )
    write_train_record(config.out, record)
    return record


def _crop_plan(model: SmallCapModel, start: ModelStart) -> CropPlan:
    encoder, cache_dir = start.retrieval_encoder, start.config.retrieval.cache_dir
    retrieval = load_preprocessing(encoder, cache_dir) if encoder else None
    return CropPlan.of(model.encoder.preprocessing, retrieval, start.config.data.decode)


def _vision_sha256(model: SmallCapModel) -> str:
    from smallcap.training.objective import weights_sha256

    return weights_sha256(model.encoder.named_parameters())


def _stream(config: TrainConfig, features: StoreManifest, folders: tuple[str, str], split: Split) -> ExampleStream:
    options = config.optimizer
    candidates = folders[1] if config.retrieval.k else None
    parts = tuple(features.parts_of(split))
    return ExampleStream(folders[0], candidates, parts, options.batch_size, options.shuffle_parts, options.seed)


def _describe_data(features: StoreManifest, inputs: TrainInputs, leaks: int | None) -> TrainData:
    errors: dict[str, int] = {}
    for part in features.parts:
        for code, count in part.errors.items():
            errors[code] = errors.get(code, 0) + count
    train = features.parts_of("train")
    return TrainData(
        images=sum(part.images for part in train),
        examples=sum(part.examples for part in train),
        validation_images=sum(part.images for part in features.parts_of("validation")),
        errors=dict(sorted(errors.items())),
        malformed=inputs.malformed,
        leaks=leaks,
    )


@dataclass(frozen=True)
class TrainingPlan:
    """What a run will train, and on what."""

    record: TrainRecord
    config: TrainConfig
    trained_parameters: int
    reduce_factor: int
    images: int  # in lists
    captions: int  # of these images
    tars: int
    row_groups: int  # of Parquet files with images
    has_validation: bool
    feature_bytes: int  # of an image's stored features

    @property
    def steps_per_epoch(self) -> int:
        """Steps for the captions of lists."""
        return -(-self.captions // self.config.optimizer.batch_size)

    def lines(self) -> list[str]:
        """Returns the plan as lines for people."""
        retrieval, steps, size = self.config.retrieval, self.steps_per_epoch, self.feature_bytes
        prompts = f"{retrieval.mode}, k = {retrieval.k}, index version {self.record.index_id}"
        return [
            f"Start: {self.record.start_id}; {self.trained_parameters:,} parameters to train, reduce factor "
            f"{self.reduce_factor}",
            f"Training images in lists: {self.images:,}, with {describe_count(self.captions, 'caption')}",
            f"Further training input: {describe_count(self.tars, 'tar')}, "
            f"{describe_count(self.row_groups, 'row group')} of Parquet files with images",
            f"Validation: {'yes' if self.has_validation else 'none; the model of the last epoch is written'}",
            f"Features: {size:,} bytes per image, {size * self.images / 1e9:.2f} GB for lists",
            f"Steps per epoch for lists: {steps:,}, in {describe_count(self.config.optimizer.epochs, 'epoch')}",
            f"Retrieval: {prompts if retrieval.k else 'none'}",
        ]


def plan(config: TrainConfig) -> TrainingPlan:
    """Lists the input, and returns what the run will train and on what; writes nothing to its output, starts no Ray.

    Raises:
        ConfigError: The options are wrong, or the output holds a run with other options.
        RunError: Storage, index or a model cannot be used.
    """
    record, start = open_record(config)
    with storage.scratch_folder() as scratch:
        inputs = list_inputs(config, str(scratch))
    model = start.load()
    vision = model.config.vision
    patches = (vision.get("image_size", 224) // vision.get("patch_size", 32)) ** 2 + 1
    kinds = [item.work.fragment.kind for item in inputs.items]
    return TrainingPlan(
        record=record,
        config=config,
        trained_parameters=sum(p.numel() for p in model.decoder.cross_attention_parameters().values()),
        reduce_factor=model.config.decoder.cross_attention_reduce_factor,
        images=inputs.listed_images,
        captions=inputs.listed_examples,
        tars=kinds.count("tar"),
        row_groups=kinds.count("parquet"),
        has_validation=inputs.has("validation"),
        feature_bytes=patches * vision["hidden_size"] * 2,
    )


def describe(summary: TrainSummary) -> str:
    """Returns what a call of the job did, in a few lines for people."""
    record, data = summary.record, summary.record.data
    steps = f"Trained {describe_count(summary.new_steps, 'step')}."
    lines = [steps if summary.new_steps else "Nothing to do: the run is complete."]
    if data is not None:
        errors = describe_counts(data.errors)
        images, captions = describe_count(data.images, "image"), describe_count(data.examples, "caption")
        lines.append(f"{images} with {captions}" + (f"; left out: {errors}" if errors else ""))
        if data.malformed:
            lines.append(f"Rows in lists that could not be read: {data.malformed:,}")
        if data.leaks is not None and data.leaks > data.images // 2:
            lines.append(
                f"Images for which one of their own captions was retrieved: {data.leaks:,}. "
                "Do the image ids in the index match those in the training data?"
            )
    for epoch in record.epochs:
        validation = "" if epoch.validation_loss is None else f", validation loss {epoch.validation_loss:.4f}"
        cider = "" if epoch.cider is None else f", CIDEr {100 * epoch.cider:.1f}"
        lines.append(f"epoch {epoch.epoch}: loss {epoch.loss:.4f}{validation}{cider}")
    lines.append(f"Model: {summary.out}/model, from epoch {record.best_epoch} (chosen by {record.selected_by})")
    return "\n".join(lines)


if __name__ == "__main__":
    from jobs.cli import main

    main("train")
