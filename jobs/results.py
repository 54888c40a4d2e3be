"""What jobs tell programs: the fields of the JSON of `--json`, which docs/formats.md describes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a command loads its own job only
    from index_builder.build import BuildPlan, BuildReport
    from jobs.caption import RunSummary
    from jobs.captioning.plan import RunPlan
    from jobs.forget import Takedown, Use
    from jobs.refresh import RefreshPlan, RefreshSummary
    from jobs.train import TrainingPlan, TrainSummary
    from jobs.variants import VariantsSummary

Values = dict[str, Any]


def caption_result(summary: RunSummary) -> Values:
    """Returns what a call of the captioning job did, and what its output now holds."""
    record = summary.record
    newest = record.attempts[-1] if summary.new_images and record.attempts else None
    return {
        "out": summary.out,
        "parquet": f"{summary.out}/part-*.parquet",
        "run_id": record.run_id,
        "model_id": record.model_id,
        "index_id": record.index_id,
        "retrieval_encoder": record.retrieval_encoder,
        "images": record.images.model_dump(),
        "error_rate": summary.error_rate,
        "new_images": summary.new_images,
        "repeated": record.count_repeated(),
        "passed_over": record.count_passed_over(),
        "seconds": newest.seconds if newest else None,
        "device": newest.device if newest else None,
        "dtype": newest.dtype if newest else None,
    }


def variants_result(summary: VariantsSummary) -> Values:
    """Returns what a call of the captioning job did for each variant."""
    return {
        "out": summary.out,
        "new_images": summary.new_images,
        "variants": {name: caption_result(of_variant) for name, of_variant in summary.runs.items()},
    }


def caption_plan(plan: RunPlan) -> Values:
    """Returns what a captioning run would do."""
    layout, measured = plan.layout, plan.measured
    return {
        "images": plan.images,
        "done": plan.done,
        "duplicates": plan.duplicates,
        "fragments": plan.fragments,
        "tars": plan.tars,
        "index": asdict(plan.index) if plan.index else None,
        "nodes": len(layout.nodes),
        "cpus": sum(node.get("CPU", 0.0) for node in layout.nodes),
        "gpus": sum(node.get("GPU", 0.0) for node in layout.nodes),
        "device": layout.actors.device,
        "dtype": layout.actors.dtype,
        "actors": layout.actors.num_actors,
        "max_actors": layout.actors.max_actors,
        "batch_size": layout.batch_size,
        "load_images_per_s": plan.load_rate,
        "caption_images_per_s": plan.caption_rate,
        "images_per_s": plan.rate,
        "bottleneck": plan.bottleneck,
        "actor_bytes": measured.actor_bytes,
        "gpu_bytes": measured.gpu_bytes,
        "start_s": measured.start_s,
        "seconds": plan.seconds,
        "gpu_hours": plan.gpu_hours,
        "gpu_hours_per_million": plan.gpu_hours_per_million,
        "cost": plan.cost(plan.gpu_hours),
    }


def refresh_result(summary: RefreshSummary) -> Values:
    """Returns what a refresh did: what a captioning run tells, and what became of the old run's rows."""
    return caption_result(summary.run) | {"refreshed": summary.refreshed.model_dump(mode="json")}


def refresh_plan(plan: RefreshPlan) -> Values:
    """Returns what a refresh would do."""
    return asdict(plan)


def forget_result(done: Takedown) -> Values:
    """Returns what a takedown did to the index and to each run."""
    return {
        "index_id": done.report.manifest.index_id,
        "captions": done.report.manifest.ntotal,
        "runs": [
            asdict(use) | {"refreshed": summary and summary.refreshed.model_dump(mode="json")}
            for use, summary in done.runs
        ],
    }


def forget_plan(uses: Sequence[Use]) -> Values:
    """Returns what a takedown would do."""
    return {"runs": [asdict(use) for use in uses]}


def build_result(report: BuildReport) -> Values:
    """Returns what a build did, and which version is now current."""
    from jobs.build_index import advice

    manifest = report.manifest
    return {
        "index": report.index_uri,
        "index_id": manifest.index_id,
        "operation": manifest.operation,
        "captions": manifest.ntotal,
        "new_captions": report.new_captions,
        "embedded": report.embedded,
        "rows": sum(source.rows for source in manifest.sources),
        "dropped": manifest.dropped,
        "shards": len(manifest.shards),
        "index_key": manifest.index_key,
        "encoder": manifest.encoder.spec,
        "recall": {f"recall@{entry.k}": entry.recall for entry in manifest.recall},
        "advice": advice(manifest),
        "seconds": report.seconds,
    }


def build_plan(plan: BuildPlan) -> Values:
    """Returns what a build would do."""
    index = plan.index
    return {
        "index": plan.index_uri,
        "rows": plan.rows,
        "dropped": plan.dropped,
        "new_captions": plan.new_captions,
        "to_embed": plan.to_embed,
        "embed_s": plan.embed_s,
        "index_key": index.index_key,
        "shards": len(index.shards),
        "training_rows": index.training_rows,
        "training_bytes": index.training_bytes if index.training_rows else 0,
        "shard_bytes": index.shard_bytes,
        "serving_bytes": index.serving_bytes,
    }


def train_result(summary: TrainSummary) -> Values:
    """Returns what a call of the training job did, and what its output now holds."""
    record = summary.record
    pinned = {"run_id", "start_id", "index_id", "retrieval_encoder", "dtype", "data", "trained_parameters", "steps"}
    ended = {"epochs", "best_epoch", "selected_by"}
    return {
        "out": summary.out,
        "model": f"{summary.out}/model",
        "new_steps": summary.new_steps,
        **record.model_dump(mode="json", include=pinned | ended),
    }


def train_plan(plan: TrainingPlan) -> Values:
    """Returns what a training run would do."""
    optimizer, retrieval = plan.config.optimizer, plan.config.retrieval
    return {
        "start_id": plan.record.start_id,
        "index_id": plan.record.index_id,
        "retrieval": retrieval.mode if retrieval.k else None,
        "k": retrieval.k,
        "trained_parameters": plan.trained_parameters,
        "reduce_factor": plan.reduce_factor,
        "images": plan.images,
        "captions": plan.captions,
        "tars": plan.tars,
        "row_groups": plan.row_groups,
        "has_validation": plan.has_validation,
        "feature_bytes": plan.feature_bytes * plan.images,
        "epochs": optimizer.epochs,
        "steps_per_epoch": plan.steps_per_epoch,
    }
