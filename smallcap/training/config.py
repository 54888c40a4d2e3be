"""The training job's options; the defaults are the paper's recipe."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from smallcap.config import ComputeConfig, Config, Dtype, InputConfig
from smallcap.storage import DEFAULT_CACHE_DIR
from smallcap.training.retrieval_sampling import RetrievalMode


class TrainDataConfig(Config):
    """What sources of images with captions look like."""

    image_column: str = "image"
    """Column of CSV, JSONL and Parquet that holds the image's path or URI, or in Parquet its bytes."""
    id_column: str = "image_id"
    """Column of Parquet files that holds the image's id; the path is the id where there is none."""
    caption_column: str = "caption"
    """Column, or field of a tar's JSON files, that holds the caption, or a list of captions."""
    input: InputConfig = InputConfig()


class TrainRetrievalConfig(Config):
    """What prompts are made of."""

    mode: RetrievalMode = "top-k"
    """`top-k`: the k nearest captions. `sample-k`: k drawn from the nearest 50, anew for each example and epoch.
    `c-sample-k`: the nearest one and k - 1 drawn."""
    k: int = Field(4, ge=0, le=50)
    """Captions in the prompt; 0 trains without retrieval."""
    cache_dir: str = DEFAULT_CACHE_DIR
    """Where a node keeps copies of remote indexes."""


class OptimizerConfig(Config):
    """How the cross-attention is trained."""

    learning_rate: float = Field(1e-4, gt=0)
    """Of AdamW, at its highest."""
    schedule: Literal["linear", "constant"] = "linear"
    """After the warm-up: `linear` falls to 0 at the last step, as in the reference; `constant` stays."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which the learning rate rises from 0."""
    weight_decay: float = Field(0.0, ge=0)
    """Of AdamW."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Longer gradients are shortened to this norm."""
    epochs: int = Field(10, ge=1)
    """Passes over all examples; an image has as many examples as captions."""
    batch_size: int = Field(64, ge=1)
    """Examples of one step, over all workers and accumulated batches."""
    accumulate: int = Field(1, ge=1)
    """Batches that a step's examples are cut into, to save memory."""
    max_caption_tokens: int = Field(25, ge=1)
    """Captions are cut to so many tokens."""
    seed: int = 0
    """Of new cross-attention, shuffling, dropout and drawn captions."""
    shuffle_parts: int = Field(16, ge=1)
    """Parts of stored features (at most 256 images each) that are held and shuffled together."""


class TrainComputeConfig(Config):
    """Where features are computed, and where training runs."""

    device: str = "auto"
    """`auto` (GPUs where Ray has any, else CPUs), `cpu`, or `cuda`."""
    num_actors: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Actors that encode and search; `auto` is one per GPU, or one per four CPU cores."""

    def of_actors(self) -> ComputeConfig:
        """Returns the same as the options of a pool of actors, which compute in float32."""
        return ComputeConfig(device=self.device, num_actors=self.num_actors, dtype="float32")


class TrainConfig(Config):
    """A training run."""

    sources: tuple[str, ...] = Field(min_length=1)
    """Images with captions: COCO captions or Karpathy's JSON, CSV, TSV, JSONL, Parquet, or WebDataset tars."""
    validation: tuple[str, ...] = ()
    """The same, for validation; by default the `val` split of Karpathy's JSON among the sources."""
    images: str | None = None
    """Folder or prefix that the images' paths are relative to; by default the source file's own."""
    index: str | None = None
    """Published index; may be left out only with `retrieval.k=0`."""
    out: str
    """Output folder or prefix."""
    model: str | None = None
    """Checkpoint to train further; or else the parts:"""
    vision_encoder: str | None = None
    """CLIP whose vision tower is taken: a folder or a hub id such as openai/clip-vit-base-patch32."""
    decoder: str | None = None
    """Language model: a folder or a hub id such as gpt2, facebook/opt-125m, facebook/xglm-564M."""
    reduce_factor: int = Field(4, ge=1)
    """Of new cross-attention: 1, 2, 4, 8 or 16."""
    eos_token: str = "."
    """Of new models: ends a caption."""
    pad_token: str = "!"
    """Of new models: fills batches."""
    retrieval_encoder: str | None = None
    """Spec of the retrieval encoder; by default the one that the index names."""
    features: str | None = None
    """Folder of stored features, to share between runs of the same images and encoders; by default OUT/features."""
    limit: int | None = Field(None, ge=1)
    """Only the first N images, of the sources and of the validation each."""
    dtype: Dtype = "auto"
    """Of the forward pass; weights are float32. `auto` is bfloat16 on a GPU, float32 on a CPU."""
    workers: int | Literal["auto"] = "auto"
    """Training processes; `auto` is one per GPU of the cluster, or one on CPUs."""
    checkpoint_steps: int | None = Field(None, ge=1)
    """Steps between checkpoints, beside the one at each epoch's end."""
    data: TrainDataConfig = TrainDataConfig()
    retrieval: TrainRetrievalConfig = TrainRetrievalConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    compute: TrainComputeConfig = TrainComputeConfig()

    @model_validator(mode="after")
    def _starts_somewhere(self) -> Self:
        parts = (self.vision_encoder, self.decoder)
        if (self.model is None) != all(parts) or (self.model is not None and any(parts)):
            raise ValueError("give --model, or both --vision-encoder and --decoder")
        if self.index is None and self.retrieval.k:
            raise ValueError("an index is needed for retrieval: give --index, or -k 0 to train without retrieval")
        return self
