"""The model that a training run starts from: a checkpoint, or a published encoder and decoder, newly joined."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from smallcap.model.files import checkpoint_id, joined_model_id
from smallcap.training.config import TrainConfig

if TYPE_CHECKING:
    from smallcap.model.checkpoint import SmallCapModel
    from smallcap.model.prompt import DecoderTokenizer


@dataclass(frozen=True)
class ModelStart:
    """Where the model comes from; every process that needs it loads it, and gets the same weights."""

    config: TrainConfig
    retrieval_encoder: str | None

    def load(self) -> SmallCapModel:
        """Loads the model in float32 on the CPU, in eval mode; its config has the run's retrieval options.

        Raises:
            CheckpointError: The checkpoint, the encoder or the decoder cannot be loaded.
            ConfigError: The encoder and the decoder do not fit.
        """
        from smallcap.model.assembly import join_frozen_models  # torch
        from smallcap.model.checkpoint import load_checkpoint

        config, k, encoder = self.config, self.config.retrieval.k, self.retrieval_encoder or ""
        if config.model is None:
            assert config.vision_encoder is not None and config.decoder is not None  # TrainConfig has checked it
            return join_frozen_models(
                config.vision_encoder,
                config.decoder,
                config.reduce_factor,
                encoder,
                k,
                config.eos_token,
                config.pad_token,
                config.optimizer.seed,
                config.retrieval.cache_dir,
            )
        model = load_checkpoint(config.model, cache_dir=config.retrieval.cache_dir)
        model.config = replace(
            model.config, k=k or model.config.k, rag=k > 0, retrieval_encoder=encoder or model.config.retrieval_encoder
        )
        return model

    def load_tokenizer(self) -> DecoderTokenizer:
        """Loads the decoder's tokenizer.

        Raises:
            CheckpointError: There is no tokenizer.
        """
        from smallcap.model.prompt import load_tokenizer

        return load_tokenizer(self.tokenizer_source, self.config.retrieval.cache_dir)

    @property
    def tokenizer_source(self) -> str:
        """The folder or hub id of the decoder's tokenizer."""
        from smallcap.model.checkpoint import tokenizer_source  # torch

        if self.config.model is None:
            return self.config.decoder or ""
        return tokenizer_source(self.config.model, self.config.retrieval.cache_dir)

    def model_id(self) -> str:
        """Returns the names of the start and the checksums of its weights, without loading anything.

        Raises:
            CheckpointError: The checkpoint, the encoder or the decoder cannot be found.
        """
        config = self.config
        return (
            checkpoint_id(config.model, config.retrieval.cache_dir)
            if config.model
            else joined_model_id(config.vision_encoder or "", config.decoder or "", config.retrieval.cache_dir)
        )
