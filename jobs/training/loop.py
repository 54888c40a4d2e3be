"""Runs a training worker: it does its share of each step and of the validation; one worker writes the checkpoints.

Workers are processes of Ray Train, joined by torch.distributed where there are several. Each reads the same stream of
examples and takes its share; only dropout depends on the share.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from jobs.cluster.metrics import record
from jobs.cluster.resources import use_threads
from jobs.cluster.side_actor import SideActor
from jobs.training.log import TrainLog
from jobs.training.progress import TrainStep
from jobs.training.record import choose_best
from jobs.training.start import ModelStart
from smallcap.decoding.engine import ALL_TOKENS, EAGER, EagerStepper, generate
from smallcap.errors import CheckpointError, ConfigError
from smallcap.generation_config import GenerationConfig
from smallcap.machine.precision import choose_kernels
from smallcap.model.checkpoint import SmallCapModel
from smallcap.model.prompt import build_prompts, build_training_example, decode_captions, encode_texts
from smallcap.training.checkpoints import (
    WEIGHTS_FILE,
    EpochResult,
    TrainCheckpoint,
    find_train_checkpoint,
    load_train_state,
    remove_train_checkpoints,
    restore_trained_weights,
    save_train_checkpoint,
)
from smallcap.training.config import TrainConfig
from smallcap.training.example_stream import Example, ExampleStream, read_examples
from smallcap.training.objective import CrossAttentionTrainer, StepReport, TokenBatch, collate, frozen_sha256
from smallcap.training.retrieval_sampling import RetrievalMode

if TYPE_CHECKING:
    from smallcap.model.prompt import DecoderTokenizer

Entry = TypeVar("Entry")
_KEPT_CHECKPOINTS = 2  # the newest, besides that of the best epoch
_TELL_EVERY_S = 1.0


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker needs to know."""

    config: TrainConfig
    start: ModelStart
    dtype: str
    examples: ExampleStream
    validation: ExampleStream
    watch: SideActor | None = None  # a `TrainWatch`, which is told how far training is


def train_worker(config: Mapping[str, Any]) -> None:
    """Runs one worker to the end of the run; Ray Train calls it in every worker.

    Args:
        config: A mapping with a `WorkerSpec` under `spec`.
    """
    from ray.train.torch import get_device

    use_threads(torch.get_num_threads())  # Ray may count more CPUs than there are cores
    spec: WorkerSpec = config["spec"]
    Worker(spec, get_device()).run()


class Worker:
    """One worker of a run, at the point where the newest checkpoint left it.

    Args:
        spec: The run.
        device: Where it trains.
    """

    def __init__(self, spec: WorkerSpec, device: torch.device) -> None:
        self.spec, self.options = spec, spec.config.optimizer
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        model = spec.start.load()
        self.texts = ExampleTexts(spec.config, model, spec.start.load_tokenizer())
        self.generation = model.generation_options(GenerationConfig())
        choose_kernels(torch.float32, device)
        self.decoder = model.decoder.to(device)  # the encoders are no longer needed
        self.steps_per_epoch = spec.examples.batches_per_epoch
        total = self.steps_per_epoch * self.options.epochs
        self.trainer = CrossAttentionTrainer(self.decoder, self.options, total, spec.dtype)
        self.frozen = frozen_sha256(self.decoder, self.decoder)
        self.progress = TrainCheckpoint(step=0, epochs=(), frozen_sha256=self.frozen, sha256={})
        newest = find_train_checkpoint(spec.config.out)
        if newest is not None:
            self._resume(newest)
        self.log = TrainLog(spec.config.out, self.progress.step)
        self._saved: tuple[int, ...] = (self.progress.step,)  # steps of the newest checkpoints
        self._told_at, self._ends = 0.0, False

    def _resume(self, checkpoint: TrainCheckpoint) -> None:
        out = self.spec.config.out
        if checkpoint.frozen_sha256 != self.frozen:
            raise CheckpointError("The checkpoint belongs to other frozen weights.", where=f"{out}/{checkpoint.folder}")
        weights = self.decoder.cross_attention_parameters()
        restore_trained_weights(weights, out, checkpoint.step, checkpoint.sha256[WEIGHTS_FILE])
        self.trainer.load_state_dict(load_train_state(out, checkpoint))
        self.progress = checkpoint

    def run(self) -> None:
        """Trains the remaining epochs, or until the driver asks to end."""
        while len(self.progress.epochs) < self.options.epochs and not self._ends:
            self._finish_epoch()
        if self.spec.watch is not None and self.rank == 0:
            self.spec.watch.ask("note_end")

    def _finish_epoch(self) -> None:
        """Takes the remaining steps of the epoch, validates, and saves; or saves before that, if it is asked to end."""
        epoch = len(self.progress.epochs)
        first = self.progress.step - epoch * self.steps_per_epoch
        every = self.spec.config.checkpoint_steps
        for place, batches in enumerate(self._prepared(epoch, first), start=first):
            began = time.monotonic()
            report = self.trainer.step(self.progress.step, batches)
            self._count(report, epoch, time.monotonic() - began)
            self._ends = self._is_asked_to_end(report.loss, epoch)
            if place + 1 < self.steps_per_epoch:
                if self._ends or (every and self.progress.step % every == 0):
                    self._save()
                if self._ends:
                    return
        loss = self.progress.epoch_loss / self.progress.epoch_tokens
        result = EpochResult(epoch=epoch + 1, step=self.progress.step, loss=loss, **self._validate())
        epochs = (*self.progress.epochs, result)
        self.progress = self.progress.model_copy(update={"epochs": epochs, "epoch_loss": 0.0, "epoch_tokens": 0})
        self._save()

    def _is_asked_to_end(self, loss: float, epoch: int) -> bool:
        """Tells the driver of the newest step; returns whether it asks to end, the same in all workers."""
        asked, watch = False, self.spec.watch
        if watch is None:
            return False
        if self.rank == 0 and time.monotonic() - self._told_at >= _TELL_EVERY_S:
            asked = bool(watch.ask("note_step", TrainStep(self.progress.step, epoch + 1, loss), timeout_s=1.0))
            self._told_at = time.monotonic()
        if self.world_size > 1:
            shared = torch.tensor(int(asked), device=self.trainer.device)
            dist.broadcast(shared, src=0)
            asked = bool(shared)
        return asked

    def _count(self, report: StepReport, epoch: int, seconds: float) -> None:
        if self.rank == 0:
            run_id = self.spec.config.out
            record("smallcap_train_steps_total", run_id, 1)
            record("smallcap_train_step_seconds_total", run_id, seconds)
            record("smallcap_train_tokens_total", run_id, report.tokens)
            record("smallcap_train_loss", run_id, report.loss)
            self.log.add(step=self.progress.step + 1, epoch=epoch + 1, loss=report.loss, tokens=report.tokens)
        loss = self.progress.epoch_loss + report.loss * report.tokens
        tokens = self.progress.epoch_tokens + report.tokens
        self.progress = self.progress.model_copy(
            update={"step": self.progress.step + 1, "epoch_loss": loss, "epoch_tokens": tokens}
        )

    def _prepared(self, epoch: int, first: int) -> Iterator[list[TokenBatch]]:
        """Yields this worker's share of each step of an epoch; reads and tokenises the next one in the meantime."""
        shares = self.spec.examples.batches(epoch, first, self.rank, self.world_size)

        def prepare() -> list[TokenBatch] | None:
            examples = next(shares, None)
            return None if examples is None else self._token_batches(examples, epoch)

        with ThreadPoolExecutor(1, "prepare") as thread:
            ahead = thread.submit(prepare)
            while (batches := ahead.result()) is not None:
                ahead = thread.submit(prepare)
                yield batches

    def _token_batches(self, examples: Sequence[Example], epoch: int) -> list[TokenBatch]:
        """Cuts a worker's share of a step into batches; all workers make the same number."""
        count, mode = self.options.accumulate, self.spec.config.retrieval.mode
        shares = [examples[place::count] for place in range(count)]
        shares = [share for share in shares if share] if self.world_size == 1 else shares
        return [self.texts.token_batch(share, mode, (self.options.seed, epoch)) for share in shares]

    def _save(self) -> None:
        """Writes the log and a checkpoint; before the last checkpoint, checks that frozen weights have not changed."""
        if self.rank == 0:
            if len(self.progress.epochs) == self.options.epochs:
                self._check_frozen()
            out, weights = self.spec.config.out, self.decoder.cross_attention_parameters()
            self.log.flush()
            self.progress = save_train_checkpoint(out, self.progress, weights, self.trainer.state_dict())
            remove_train_checkpoints(out, self._kept())
        if self.world_size > 1:
            dist.barrier()

    def _check_frozen(self) -> None:
        after = frozen_sha256(self.decoder, self.decoder)
        if after != self.frozen:
            raise CheckpointError("Training has changed weights that are frozen.", expected=self.frozen, found=after)

    def _kept(self) -> set[int]:
        """Returns the steps whose checkpoints stay: the newest, and that of the best epoch."""
        self._saved = (*self._saved, self.progress.step)[-_KEPT_CHECKPOINTS:]
        best = {choose_best(self.progress.epochs)[0].step} if self.progress.epochs else set()
        return {*self._saved, *best}

    def _validate(self) -> dict[str, float | None]:
        """Returns loss and CIDEr of the validation images, over all workers; None where they cannot be measured."""
        stream = self.spec.validation
        if not stream.examples:
            return {"validation_loss": None, "cider": None}
        captions: dict[str, str] = {}
        references: dict[str, list[str]] = {}

        def batches() -> Iterator[TokenBatch]:
            for examples in self._validation_batches():
                captions.update(self._caption([example for example in examples if example.number == 0]))
                for example in examples:
                    references.setdefault(example.image_id, []).append(example.caption)
                yield self.texts.token_batch(examples, "top-k", (0,))

        loss = self.trainer.evaluate(batches())
        cider = score_cider(_gathered(captions), _gathered(references))
        return {"validation_loss": loss.loss, "cider": cider}

    def _validation_batches(self) -> Iterator[Sequence[Example]]:
        """Yields this worker's share of the validation examples; each worker reads different parts."""
        stream, size = self.spec.validation, self.options.batch_size
        for part in stream.parts[self.rank :: self.world_size]:
            examples = read_examples(stream, part)
            yield from (examples[start : start + size] for start in range(0, len(examples), size))

    def _caption(self, examples: Sequence[Example]) -> dict[str, str]:
        """Captions images, with the nearest captions in the prompt."""
        if not examples:
            return {}
        self.decoder.eval()
        features = torch.from_numpy(np.stack([example.features for example in examples]))
        hidden_states = features.to(self.trainer.device).float()
        prompts = self.texts.prompts(examples, "top-k", (0,))
        stepper = EagerStepper(ALL_TOKENS) if self.trainer.device.type == "cuda" else EAGER
        generated = generate(self.decoder, hidden_states, prompts, self.generation, stepper=stepper)
        eos = self.generation.eos_token_id
        texts = decode_captions(self.texts.tokenizer, [best.token_ids for best, *_ in generated], eos)
        return {example.image_id: text for example, text in zip(examples, texts, strict=True)}


class ExampleTexts:
    """Turns examples into token ids.

    Args:
        config: The run's config.
        model: The model, whose config has the template and the special tokens.
        tokenizer: The decoder's tokenizer.
    """

    def __init__(self, config: TrainConfig, model: SmallCapModel, tokenizer: DecoderTokenizer) -> None:
        self.tokenizer, self._model, self._config = tokenizer, model.config, config
        self._shape = (1, 1, model.config.vision["hidden_size"])

    def prompts(self, examples: Sequence[Example], mode: RetrievalMode, seed: Sequence[int]) -> list[list[int]]:
        """Returns each example's prompt."""
        k = self._config.retrieval.k
        retrieved = [example.retrieved(k, mode, seed) for example in examples]
        return build_prompts(self.tokenizer, self._model.template, retrieved, self._model.bos_token_id)

    def token_batch(self, examples: Sequence[Example], mode: RetrievalMode, seed: Sequence[int]) -> TokenBatch:
        """Returns examples as the decoder takes them; without examples, a batch without labels.

        Raises:
            ConfigError: A prompt and its caption do not fit the decoder's positions.
        """
        eos, pad = self._model.eos_token_id, self._model.pad_token_id
        if not examples:
            ignored = collate([([pad], [-100])], pad)
            return TokenBatch(torch.zeros(self._shape), *ignored)
        prompts = self.prompts(examples, mode, seed)
        captions = encode_texts(self.tokenizer, [example.caption for example in examples])
        longest = self._config.optimizer.max_caption_tokens
        built = [
            build_training_example(prompt, caption, eos, pad, longest)
            for prompt, caption in zip(prompts, captions, strict=True)
        ]
        inputs, labels = collate(built, pad)
        if inputs.shape[1] > self._model.decoder.max_positions:
            raise ConfigError(
                "A prompt and its caption do not fit the decoder's positions.",
                expected=f"at most {self._model.decoder.max_positions} tokens",
                found=f"{inputs.shape[1]} tokens",
                remedy="Retrieve fewer captions (-k), or index shorter ones.",
            )
        features = torch.from_numpy(np.stack([example.features for example in examples]))
        return TokenBatch(features, inputs, labels)


def score_cider(captions: Mapping[str, str], references: Mapping[str, list[str]]) -> float | None:
    """Returns the CIDEr of captions; None where pycocoevalcap is not installed."""
    if find_spec("pycocoevalcap") is None:
        return None
    from smallcap.evaluation.caption_metrics import score_captions

    return float(score_captions(captions, references, ("cider",))["cider"].mean)


def _gathered(entries: dict[str, Entry]) -> dict[str, Entry]:
    """Returns the entries of all workers, sorted by key."""
    shares: list[Any] = [entries]
    if dist.is_initialized() and dist.get_world_size() > 1:
        shares = [None] * dist.get_world_size()
        dist.all_gather_object(shares, entries)
    return dict(sorted((key, value) for share in shares for key, value in share.items()))
