"""The first stage of training: fetches, decodes and encodes every image once, and stores the results.

    fragments of the input → load (as captioning does, CPU tasks) → encode (actor pool) → write parts

A batch of at most 256 images of a fragment travels as one row and becomes one part, so that a resumed run knows from
the names of the parts what remains. Features are computed in float32 and stored in float16.
"""

from __future__ import annotations

import json
import pickle
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.captioning.caption import Growth
from jobs.captioning.caption_table import pixels_of
from jobs.captioning.layout import count_images
from jobs.captioning.load import LoadSpec, load_batch, read_guarded, start_loading
from jobs.captioning.watch import watch_run
from jobs.cluster.display import Activity
from jobs.cluster.errors import GuardedActor, unwrapped_errors
from jobs.cluster.metrics import record
from jobs.cluster.resources import node_resources, on_working_nodes, use_threads, wait_for_room
from jobs.cluster.tasks import iter_small_rows, map_in_actors
from jobs.training.inputs import TrainInputs, TrainItem
from jobs.training.pairs import captions_of
from jobs.training.start import ModelStart
from smallcap import storage
from smallcap.captioner import Captioner
from smallcap.captioner_setup import CaptionerOptions
from smallcap.decoding.micro_batches import MicroBatches
from smallcap.images.crops import CropPlan
from smallcap.images.fragments import FRAGMENT_ROWS
from smallcap.machine.actor_plan import plan_actors
from smallcap.model.clip_encoder import load_retrieval_encoder
from smallcap.model.encoder_spec import resolve_encoder_identity
from smallcap.output.schema import STATUS_OK
from smallcap.training.config import TrainConfig
from smallcap.training.feature_store import (
    FEATURES_FILE,
    StoreManifest,
    feature_table,
    finished_fragments,
    list_parts,
    open_store,
    part_name,
    write_part,
)

_ENCODED_TOGETHER = 64  # images


class VisionSide(NamedTuple):
    """What the model's encoders see, and the fingerprint of the vision encoder's weights."""

    plan: CropPlan
    sha256: str


def features_identity(start: ModelStart, inputs: TrainInputs, vision: VisionSide) -> dict[str, Any]:
    """Returns everything that decides the stored features."""
    spec = start.retrieval_encoder
    retrieval = resolve_encoder_identity(spec, start.config.retrieval.cache_dir) if spec else None
    return {
        "vision_encoder_sha256": vision.sha256,
        "retrieval_encoder": retrieval.model_dump(include={"weights_sha256", "dim"}) if retrieval else None,
        "preprocessing": json.loads(json.dumps(asdict(vision.plan))),
        "inputs_sha256": inputs.sha256,
        "max_image_pixels": start.config.data.max_image_pixels,
        "limit": start.config.limit,
        "dtype": "float16",
    }


def store_features(
    config: TrainConfig,
    start: ModelStart,
    inputs: TrainInputs,
    vision: VisionSide,
    folder: str,
    activity: Activity,
) -> StoreManifest:
    """Computes the features of all images that have none yet; where there are any, a cluster must be connected.

    Args:
        config: The run's config.
        start: The model before training.
        inputs: What there is to train on.
        vision: What the encoders see.
        folder: The folder of features.
        activity: Counts the images.

    Raises:
        ConfigError: The folder holds features of other images or encoders.
        RunError: Storage or a model fails.
    """
    uri = storage.join(folder, FEATURES_FILE)
    manifest = open_store(uri, features_identity(start, inputs, vision))
    if manifest.complete:
        return manifest
    done = {split: finished_fragments(folder, split) for split in ("train", "validation")}
    left = [item for item in inputs.items if item.work.fragment.number not in done[item.split]]
    if left:
        activity.total = count_images([item.work for item in left])
        for images in _encode_all(config, start, left, vision.plan, folder):
            activity.done += images
    manifest = manifest.model_copy(update={"complete": True, "parts": list_parts(folder)})
    manifest.write(uri)
    return manifest


def _encode_all(
    config: TrainConfig, start: ModelStart, items: list[TrainItem], plan: CropPlan, folder: str
) -> Iterator[int]:
    """Encodes and stores the images of all items; yields the numbers of images in the parts."""
    actors = plan_actors(config.compute.to_compute_config(), node_resources())
    with unwrapped_errors():
        wait_for_room(actors)
    with unwrapped_errors(), watch_run(config.out, None, len(items)) as watch:
        loading = LoadSpec(plan, config.data, pa.schema([]), False, watch.monitor, watch.crash_guard)
        loaded = start_loading(items, load_items, loading, FRAGMENT_ROWS, actors)
        arguments = (start, actors.device, actors.threads)
        encoded = map_in_actors(loaded, EncodeImages, arguments, 1, actors, watch.fault_guard)
        stored = encoded.map_batches(
            store_part,
            batch_size=1,
            batch_format="pyarrow",
            fn_kwargs={"folder": folder},
            num_cpus=0,
            **on_working_nodes(),
        )
        for row in iter_small_rows(stored):
            yield row["images"]


def load_items(batch: pa.Table, spec: LoadSpec) -> Iterator[pa.Table]:
    """Reads fragments of the input and loads their images; see `jobs.captioning.load`.

    Args:
        batch: A table with pickled `TrainItem`s in its column `item`.
        spec: What the task needs to know.

    Yields:
        One row for each batch of at most 256 images: `split`, the `name` of its part, `kept` (the names of the columns
        with captions), and `images`, the table of `load_batch` in Arrow's IPC format.
    """
    for pickled in batch["item"]:
        item: TrainItem = pickle.loads(pickled.as_py())  # noqa: S301 - this job's driver wrote it
        fragment = item.work.fragment
        item_spec = replace(spec, kept_columns=item.kept)
        batches = read_guarded(item.work, item_spec)
        following = next(batches, None)
        number = 0
        while following is not None:
            images, following = following, next(batches, None)
            loaded = load_batch(fragment.number, images, item_spec)
            row = {"split": item.split, "name": part_name(fragment.number, number, following is None)}
            yield _as_row(row | {"kept": item.kept.names}, loaded)
            number += 1


class EncodeImages(GuardedActor):
    """Encodes batches of decoded images; one instance per actor."""

    def load(self, start: ModelStart, device: str, threads: int) -> None:
        """Loads the encoders."""
        use_threads(threads)
        self._caption_column = start.config.data.caption_column
        encoder, cache_dir = start.retrieval_encoder, start.config.retrieval.cache_dir
        retrieval = load_retrieval_encoder(encoder, device, cache_dir=cache_dir) if encoder else None
        options = CaptionerOptions(k=0, clip_score=False)
        self._encoders = Captioner(start.load().to(device), start.load_tokenizer(), retrieval, options=options)
        free = self._encoders.model.free_memory
        self._together = MicroBatches("the encoders", free, "Give --device cpu", _ENCODED_TOGETHER)
        self._run_id, self._halvings = start.config.out, Growth()

    def process(self, batch: pa.Table) -> pa.Table:
        """Maps a row of `load_items` to a row whose `images` are the features of a part."""
        row, began = batch.to_pylist()[0], time.monotonic()
        images = pa.ipc.open_stream(batch["images"][0].as_buffer()).read_all()
        good = np.flatnonzero(pc.equal(images["status"], STATUS_OK).to_numpy()).tolist()
        captions = captions_of(images.select(row["kept"]), self._caption_column)
        table = feature_table(images, captions, *self._encode(images, good))
        self._count(images, time.monotonic() - began)
        return _as_row({"split": row["split"], "name": row["name"]}, table)

    def _count(self, images: pa.Table, seconds: float) -> None:
        """Counts a batch in the metrics."""
        stage = {"stage": "encode"}
        record("smallcap_images_total", self._run_id, len(images), stage)
        record("smallcap_busy_seconds_total", self._run_id, seconds, stage)
        for code, count in Counter(images["error_code"].drop_null().to_pylist()).items():
            record("smallcap_errors_total", self._run_id, count, {"code": code})
        record("smallcap_memory_halvings_total", self._run_id, self._halvings.new(self._together.halvings))

    def _encode(self, images: pa.Table, rows: list[int]) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns features [n, P, Hv] float16 and embeddings [n, dim] of the given rows, which may be none."""

        def encode(some: slice) -> tuple[np.ndarray, np.ndarray]:
            pixels = pixels_of(images, rows[some] or [0])  # a failed row's pixels are 0
            hidden_states, class_tokens = self._encoders.encode(pixels)
            return hidden_states.half().cpu().numpy(), self._encoders.embed(pixels, class_tokens)

        encoded = self._together.run(max(1, len(rows)), encode)
        features = np.concatenate([features for features, _ in encoded])[: len(rows)]
        if self._encoders.retrieval_encoder is None:
            return features, None
        return features, np.concatenate([embeddings for _, embeddings in encoded])[: len(rows)]


def store_part(batch: pa.Table, folder: str) -> pa.Table:
    """Writes a row from `EncodeImages` as a part; returns how many images it has."""
    row = batch.select(["split", "name"]).to_pylist()[0]
    table = pa.ipc.open_stream(batch["images"][0].as_buffer()).read_all()
    write_part(storage.join(folder, row["split"], row["name"]), table)
    return pa.table({"images": [len(table)]})


def _as_row(values: dict[str, Any], table: pa.Table) -> pa.Table:
    """Returns one row that holds a whole table, so that Ray neither splits nor joins it."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    row = pa.Table.from_pylist([values])
    return row.append_column("images", pa.array([sink.getvalue().to_pybytes()], pa.large_binary()))
