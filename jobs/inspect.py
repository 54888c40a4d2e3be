"""Describes what smallcap has written: its facts and sample rows, as plain values that print as JSON or as tables.

An index, a captioning run and its tars, a training run, or a model. Only the last two need torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from typing import Any

from jobs.captioning.record import load_existing_run
from jobs.captioning.scores import Scores
from jobs.kinds import MODEL_FILE, TAR, Kind, find_kind
from smallcap import storage
from smallcap.config import CaptionConfig
from smallcap.errors import ConfigError
from smallcap.index.caption_store import load_caption_sample
from smallcap.model.files import DEMO, demo_folder
from smallcap.options import list_settings, load_config
from smallcap.output.part_files import RUN_FILE, list_parts, read_part_infos
from smallcap.output.reading import read_captions
from smallcap.output.schema import CAPTION_COLUMNS
from smallcap.output.variant_runs import load_variants
from smallcap.output.webdataset import read_samples

_MOST_SAMPLES = 10_000
_ERROR_COLUMNS = ("image_id", "image_uri", "error_code", "error_message")

Facts = dict[str, Any]


def inspect_path(path: str, samples: int, errors: bool = False) -> Facts:
    """Returns the facts of whatever is at a path; `kind` says what it is.

    Args:
        path: The folder or prefix of an index, a run, a training run or a model; a WebDataset tar, or a folder of them.
        samples: The number of rows to show.
        errors: Whether to list the images that failed, as `errors`, in place of the samples.

    Raises:
        ConfigError: There is nothing that smallcap knows, or nothing of this kind fails image by image.
        RunError: What is there is malformed.
    """
    kind = find_kind(path)
    facts = _LOOKS[kind](path, 0 if errors else samples)
    if not errors:
        return facts
    if kind == "run":
        failed = read_captions(path, _ERROR_COLUMNS, status="error").rows()
    elif kind == "training run":
        failed = _failed_features(path, facts)
    else:
        raise ConfigError(
            "Only runs have failed images.",
            where=path,
            expected="a captioning run or a training run",
            found=facts["kind"],
            remedy="Leave --errors out, or give the run's folder.",
        )
    del facts["samples"]
    return facts | {"errors": list(failed)}


def _inspect_index(path: str, samples: int) -> Facts:
    manifest, rows = load_caption_sample(path, min(samples, _MOST_SAMPLES))
    return {
        "kind": "index",
        "path": path,
        "ntotal": manifest.ntotal,
        "bytes": sum(entry.bytes for entry in manifest.files),
        "shards": len(manifest.shards),
        "removed": manifest.id_count - manifest.ntotal,
        "recall": {f"recall@{entry.k}": entry.recall for entry in manifest.recall},
        "recall_low": {f"recall@{entry.k}": entry.recall_low for entry in manifest.recall},
        "ceiling": {f"recall@{entry.k}": entry.ceiling for entry in manifest.recall},
        "queries": manifest.recall[0].queries if manifest.recall else None,
        "queries_per_s": max((entry.queries_per_s for entry in manifest.recall), default=None),
        **manifest.model_dump(
            mode="json",
            include={
                *("index_id", "index_key", "nlist", "nprobe", "k_factor", "codec", "dim", "metric", "encoder"),
                *("recall_target", "recall_queries", "operation", "parents", "dropped", "sources", "created_at"),
            },
        ),
        "samples": [{"caption_id": row.caption_id, "text": row.text, "image_id": list(row.image_ids)} for row in rows],
    }


def _inspect_run(path: str, samples: int) -> Facts:
    record = load_existing_run(path)
    captions = read_captions(path)
    names = [name for name in CAPTION_COLUMNS.names if name in captions.schema.names]  # without kept columns
    scores = record.scores if record.status == "complete" else None
    return {
        "kind": "run",
        "path": path,
        "parts": len(list_parts(path)),
        **record.model_dump(mode="json"),
        "scores": (scores or Scores.of(path)).model_dump(mode="json"),
        "samples": list(islice(captions.select(names).rows(), samples)),
    }


def _inspect_variants(path: str, samples: int) -> Facts:
    """Describes what variants have of their own, and the first rows of each."""
    runs = {name: _inspect_run(storage.join(path, name), samples) for name in load_variants(path)}
    options = [dict(list_settings(load_config(CaptionConfig, base=run["config"]))) for run in runs.values()]
    differing = [key for key in options[0] if key != "out" and len({one[key] for one in options}) > 1]
    facts = ("run_id", "status", "model_id", "images", "scores")
    return {
        "kind": "variants",
        "path": path,
        "variants": {
            name: {key: of_variant[key] for key in differing} | {fact: run[fact] for fact in facts}
            for (name, run), of_variant in zip(runs.items(), options, strict=True)
        },
        "samples": [{"variant": name} | row for name, run in runs.items() for row in run["samples"]],
    }


def _inspect_tars(path: str, samples: int) -> Facts:
    """Describes WebDataset tars; the images of a run's tars are counted by the footers of its parts."""
    tars = list(storage.iter_files(path, (TAR,)))
    run = storage.absolute(path).rpartition("/")[0]
    of_run = storage.exists(storage.join(run, RUN_FILE))
    if of_run:
        names = {tar.rpartition("/")[2].removesuffix(TAR) for tar in tars}
        images = sum(info.ok for name, info in read_part_infos(run) if name.removesuffix(".parquet") in names)
    else:
        images = sum(1 for tar in tars for _ in read_samples(tar))
    rows = (row for tar in tars for row in read_samples(tar))
    return {
        "kind": "webdataset",
        "path": path,
        "run": run if of_run else None,
        "tars": len(tars),
        "bytes": sum(storage.size(tar) or 0 for tar in tars),
        "images": images,
        "samples": list(islice(rows, samples)),
    }


def _inspect_model(path: str, samples: int) -> Facts:
    """Describes a checkpoint by its config and the header of its weights, which are not loaded."""
    from smallcap.model.checkpoint import load_config

    folder = str(demo_folder() / "model" / "smallcap") if path == DEMO else path
    files = storage.list_folder(folder)
    with storage.local_file(storage.join(folder, MODEL_FILE)) as file:
        config = load_config(file.parent)
    weights = [uri for uri in files if uri.endswith((".safetensors", ".bin"))]
    vision = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    return {
        "kind": "model",
        "path": path,
        "parameters": sum(map(_count_parameters, weights)) if all(map(_has_header, weights)) else None,
        "files": {uri.rpartition("/")[2]: storage.size(uri) for uri in files},
        "encoder": {name: config.vision[name] for name in vision if name in config.vision},
        "decoder": asdict(config.decoder),
        "k": config.k if config.rag else 0,
        "retrieval_encoder": config.retrieval_encoder,
        "num_beams": config.num_beams,
        "max_new_tokens": config.max_new_tokens,
        "length_penalty": config.length_penalty,
        "template": asdict(config.template),
        "samples": [],
    }


def _has_header(uri: str) -> bool:
    return uri.endswith(".safetensors")  # a .bin file would have to be unpickled


def _count_parameters(uri: str) -> int:
    with storage.open_ranged(uri) as file:
        tensors = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for name, tensor in tensors.items() if name != "__metadata__")


def _inspect_training(path: str, samples: int) -> Facts:
    from jobs.training.log import read_log_lines
    from jobs.training.record import load_train_record
    from smallcap.training.checkpoints import find_train_checkpoint

    record = load_train_record(path)
    assert record is not None, "find_kind has found it"
    checkpoint = find_train_checkpoint(path)
    lines = read_log_lines(path)
    model = storage.join(path, "model")
    return {
        "kind": "training run",
        "path": path,
        "model": model if storage.exists(storage.join(model, MODEL_FILE)) else None,
        "steps_done": len(lines),
        "checkpoint": checkpoint.folder if checkpoint else None,
        **record.model_dump(mode="json"),
        "samples": [json.loads(line) for line in lines[max(0, len(lines) - samples) :]],
    }


_LOOKS: dict[Kind, Callable[[str, int], Facts]] = {
    "index": _inspect_index,
    "run": _inspect_run,
    "variants": _inspect_variants,
    "webdataset": _inspect_tars,
    "model": _inspect_model,
    "training run": _inspect_training,
}


def _failed_features(path: str, facts: Facts) -> Iterator[dict[str, Any]]:
    from smallcap.training.feature_store import read_failures

    yield from read_failures(facts["config"]["features"] or storage.join(path, "features"), _ERROR_COLUMNS)
