"""Decides how many training workers there are and what they run on, and starts them with Ray Train."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from typing import Any

from jobs.cluster.display import Display
from jobs.cluster.errors import unwrapped_errors
from jobs.cluster.resources import node_resources
from jobs.cluster.side_actor import SideActor, run_side_actor
from jobs.training.loop import WorkerSpec, train_worker
from jobs.training.progress import TrainView, TrainWatch
from smallcap import storage
from smallcap.errors import ConfigError
from smallcap.machine.actor_plan import plan_actors
from smallcap.training.config import TrainConfig

_MAX_FAILURES = 3  # of workers, before the run fails; after each, training resumes from the newest checkpoint
_LAST_CHECKPOINT_S = 60.0  # a step, or a validation, may take longer; then the newest checkpoint stands


@dataclass(frozen=True)
class TrainPlan:
    """How training is laid out on its cluster."""

    device: str
    dtype: str
    workers: int
    cpus_per_worker: int


def check_installed() -> None:
    """Checks that Ray Train can be imported, before hours are spent on features; a cluster must be connected.

    Raises:
        ConfigError: Ray Train cannot be imported.
    """
    try:
        import ray.train  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "Ray Train is not installed.", found=str(error), remedy="Install the extra: pip install 'smallcap[train]'."
        ) from error


def plan_training(config: TrainConfig, dtype: str | None) -> TrainPlan:
    """Lays training out on the cluster that this process is connected to.

    Args:
        config: The run's config.
        dtype: The precision of an earlier attempt, which later ones keep.
    """
    nodes = node_resources()
    device = plan_actors(config.compute.to_compute_config(), nodes).device
    gpus, cpus = (int(sum(node.get(resource, 0) for node in nodes)) for resource in ("GPU", "CPU"))
    automatic = max(1, gpus) if device == "cuda" else 1
    workers = automatic if config.workers == "auto" else config.workers
    largest_node = int(max(node.get("CPU", 0) for node in nodes))
    if dtype is None:
        dtype = {"cuda": "bfloat16", "cpu": "float32"}[device] if config.dtype == "auto" else config.dtype
    available = gpus if device == "cuda" else cpus
    if workers > available:
        raise ConfigError(
            "The cluster is too small for so many workers.",
            where="workers",
            expected=f"at most {available}, the number of its {'GPUs' if device == 'cuda' else 'CPUs'}",
            found=str(workers),
        )
    cpus_per_worker = 1 if device == "cuda" else max(1, min(largest_node, (cpus - 1) // workers))
    return TrainPlan(device, dtype, workers, cpus_per_worker)


def fit(spec: WorkerSpec, plan: TrainPlan, run_id: str, display: Display) -> None:
    """Trains to the end; a worker that dies is replaced, and all workers resume from the newest checkpoint.

    Raises:
        RunError: A worker raised it.
        KeyboardInterrupt: A signal came; the workers have written a checkpoint, if they had begun.
        ray.train.TrainingFailedError: Workers died too often.
    """
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # paths in the config are relative to where the job was started
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, WorkerGroupError

    steps = spec.examples.batches_per_epoch * spec.config.optimizer.epochs
    with (
        storage.scratch_folder() as scratch,
        unwrapped_errors(),
        run_side_actor(TrainWatch, spec.config.out) as watch,
        display.show(TrainView(watch, steps)),
    ):
        trainer = _trainer_class()(
            train_worker,
            train_loop_config={"spec": replace(spec, watch=watch)},
            scaling_config=ScalingConfig(
                num_workers=plan.workers,
                use_gpu=plan.device == "cuda",
                resources_per_worker={"CPU": plan.cpus_per_worker, **({"GPU": 1} if plan.device == "cuda" else {})},
            ),
            run_config=RunConfig(
                name=run_id,
                storage_path=str(scratch),  # smallcap writes its checkpoints to the run's folder, on any storage
                failure_config=FailureConfig(max_failures=_MAX_FAILURES),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        try:
            trainer.fit()
        except WorkerGroupError as error:
            raise next(iter(error.worker_failures.values())) from None
        except KeyboardInterrupt:
            _end(watch, trainer.controller)
            raise


def _trainer_class() -> Any:
    from ray.train.torch import TorchTrainer

    class Trainer(TorchTrainer):
        """Leaves Ctrl-C to the job, where Ray Train would take it over and end without a checkpoint.

        Attributes:
            controller: The actor that controls the workers; they end with it.
        """

        controller: Any = None

        def _register_sigint_handler(self, controller: Any) -> None:
            self.controller = controller

    return Trainer


def _end(watch: SideActor, controller: Any) -> None:
    """Lets the workers write a checkpoint if they train, and ends them."""
    import ray

    watch.tell("ask_to_end")
    deadline = time.monotonic() + _LAST_CHECKPOINT_S
    while watch.ask("is_waited_for", timeout_s=1.0) and time.monotonic() < deadline:
        time.sleep(0.1)
    if controller is not None:
        ray.kill(controller)
