"""The training job's options; the defaults are the paper's recipe."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from smallcap.config import (
    AutoCount,
    ComputeConfig,
    Device,
    Dtype,
    IndexId,
    InputConfig,
    ModelHash,
    OutputPlace,
    ReduceFactor,
)
from smallcap.options import ENCODER, MODEL, POSITIONAL_FILES, URI, Config, Flag
from smallcap.storage import DEFAULT_CACHE_DIR
from smallcap.training.retrieval_sampling import RetrievalMode


class TrainDataConfig(InputConfig):
    """How images and captions are named, fetched and decoded."""

    image_column: str = "image"
    """Column of CSV, JSONL and Parquet that holds the image's path or URI; in Parquet it may hold the image's bytes."""
    id_column: str = "image_id"
    """Column of Parquet files that holds the image's id. Without such a column the path is the id."""
    caption_column: str = "caption"
    """Column, or field of a tar's JSON files, that holds the caption or a list of captions."""


class TrainRetrievalConfig(Config):
    """Which captions the prompts hold."""

    mode: Annotated[RetrievalMode, Flag(("--retrieval",))] = "top-k"
    """`top-k` takes the k nearest captions. `sample-k` draws k from the nearest 50, anew for each example and epoch.
    `c-sample-k` takes the nearest one and draws k - 1."""
    k: Annotated[int, Flag(("-k", "--k"))] = Field(4, ge=0, le=50)
    """Retrieved captions in the prompt. 0 trains without retrieval."""
    cache_dir: str = DEFAULT_CACHE_DIR
    """Folder on each node for copies of remote indexes and models."""


class OptimizerConfig(Config):
    """How the cross-attention is trained."""

    learning_rate: float = Field(1e-4, gt=0)
    """AdamW's learning rate at its highest."""
    schedule: Literal["linear", "constant"] = "linear"
    """Learning rate after the warm-up: `linear` falls to 0 at the last step, as in the reference; `constant` stays."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which the learning rate rises from 0."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Longer gradients are shortened to this norm."""
    epochs: int = Field(10, ge=1)
    """Passes over all examples. An image has as many examples as captions."""
    batch_size: int = Field(64, ge=1, le=1_000_000)
    """Examples of a step, over all workers and accumulated batches."""
    accumulate: int = Field(1, ge=1, le=1_000_000)
    """Batches that the examples of a step are split into, to save memory."""
    max_caption_tokens: int = Field(25, ge=1, le=512)
    """Longer captions are cut to this number of tokens."""
    seed: int = Field(0, ge=0)
    """Seed of new cross-attention, shuffling, dropout and drawn captions."""
    shuffle_parts: int = Field(16, ge=1)
    """Parts of stored features (at most 256 images each) that are held in memory and shuffled together."""


class TrainComputeConfig(Config):
    """Where images are encoded, and where training runs."""

    device: Device = "auto"
    """Device for encoding and training. `auto` takes GPUs if Ray has any, else CPUs."""
    num_actors: AutoCount = "auto"
    """Actors that encode and search. `auto` is one per GPU, or one per four CPU cores."""

    def to_compute_config(self) -> ComputeConfig:
        """Returns the options of a pool of actors, which compute in float32."""
        return ComputeConfig(device=self.device, num_actors=self.num_actors, dtype="float32")


class TrainConfig(Config):
    """A training run."""

    sources: Annotated[tuple[str, ...], POSITIONAL_FILES] = Field(min_length=1)
    """Images with captions: COCO captions or Karpathy's JSON, CSV, TSV, JSONL, Parquet, or WebDataset tars."""
    validation: Annotated[tuple[str, ...], URI] = ()
    """Images with captions to choose the best epoch by; by default the `val` split of Karpathy's JSON among the
    sources."""
    images: Annotated[str | None, URI] = None
    """Folder or prefix that the images' paths are relative to; by default the source file's folder."""
    index: Annotated[str | None, URI] = None
    """Published index that prompts are made from; needed unless `-k` is 0."""
    out: OutputPlace
    """Output folder or prefix. The trained model is written to OUT/model."""
    model: Annotated[str | None, MODEL] = None
    """Checkpoint to train further. Otherwise the model is made of a vision encoder and a decoder."""
    vision_encoder: Annotated[str | None, MODEL] = None
    """CLIP whose vision tower is taken: a folder, a prefix, or a hub id such as openai/clip-vit-base-patch32."""
    decoder: Annotated[str | None, MODEL] = None
    """Language model: a folder, a prefix, or a hub id such as gpt2, facebook/opt-125m, facebook/xglm-564M."""
    reduce_factor: ReduceFactor = 4
    """Factor by which the heads of a new cross-attention are smaller."""
    eos_token: Annotated[str, Flag(any_text=True)] = "."
    """Token that ends a new model's captions."""
    pad_token: Annotated[str, Flag(any_text=True)] = "!"
    """Token that fills a new model's batches."""
    retrieval_encoder: Annotated[str | None, ENCODER] = None
    """Retrieval encoder: `open_clip:MODEL/PRETRAINED` or `hf:ID-PATH-OR-URI`; by default the one that the index
    names."""
    features: Annotated[str | None, URI] = None
    """Folder of stored features, to share between runs of the same images and encoders; by default OUT/features."""
    require_index_id: IndexId = None
    """Refuse any other version of the index than this one, before anything is read."""
    require_model_hash: ModelHash = None
    """Refuse a `--model` whose weights file has another sha256 (or beginning of one, 12 digits or more)."""
    limit: int | None = Field(None, ge=1)
    """Use only the first N images of the sources, and the first N for validation."""
    dtype: Dtype = "auto"
    """Precision of the forward pass; weights are float32. `auto` is bfloat16 on a GPU, float32 on a CPU."""
    workers: AutoCount = "auto"
    """Training processes. `auto` is one per GPU of the cluster, or one on CPUs."""
    checkpoint_steps: int | None = Field(None, ge=1)
    """Steps between checkpoints. The end of each epoch always has one."""
    data: TrainDataConfig = TrainDataConfig()
    retrieval: TrainRetrievalConfig = TrainRetrievalConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    compute: TrainComputeConfig = TrainComputeConfig()

    @model_validator(mode="after")
    def _starts_somewhere(self) -> Self:
        parts, missing = (self.vision_encoder, self.decoder), []
        if (self.model is None) != all(parts) or (self.model is not None and any(parts)):
            missing.append("a model to start from is needed: give --model, or both --vision-encoder and --decoder")
        if self.require_model_hash is not None and self.model is None:
            missing.append("--require-model-hash is for --model")
        if self.index is None and self.retrieval.k:
            missing.append("an index is needed for retrieval: give --index, or -k 0 to train without retrieval")
        if missing:
            raise ValueError("; ".join(missing))
        return self
