"""Makes a SmallCap model of a published CLIP vision tower, a published language model, and new cross-attention.

Both are read as transformers saves them, from the hub or from folders; the result is a model like any other.

Source: RitaRamo/smallcap train.py `get_model_and_auxiliaries`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPModel, CLIPVisionModel, GPT2LMHeadModel, OPTForCausalLM, PreTrainedModel, XGLMForCausalLM

from smallcap.errors import CheckpointError, ConfigError
from smallcap.model.checkpoint import DECODER_KINDS, SmallCapConfig, SmallCapModel
from smallcap.model.files import joined_model_id, resolve_folder, weights_file
from smallcap.model.prompt import load_tokenizer
from smallcap.storage import DEFAULT_CACHE_DIR

if TYPE_CHECKING:
    from smallcap.decoding.text_decoder import DecoderConfig

# The sizes that the reference writes into a checkpoint's encoder config; transformers derives the rest.
_VISION_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("image_size", "patch_size", "hidden_act", "layer_norm_eps"),
)
_VISION_MODELS: dict[str, type[PreTrainedModel]] = {"clip": CLIPModel, "clip_vision_model": CLIPVisionModel}


@dataclass(frozen=True)
class LanguageModelKind:
    """A language model's class in transformers, and the decoder that it becomes."""

    decoder: str  # a key of DECODER_KINDS
    model: type[PreTrainedModel]


LANGUAGE_MODELS = {
    "gpt2": LanguageModelKind("this_gpt2", GPT2LMHeadModel),
    "opt": LanguageModelKind("this_opt", OPTForCausalLM),
    "xglm": LanguageModelKind("this_xglm", XGLMForCausalLM),
}


def join_frozen_models(
    vision_encoder: str,
    decoder: str,
    reduce_factor: int = 4,
    retrieval_encoder: str = "",
    k: int = 4,
    eos_token: str = ".",
    pad_token: str = "!",
    seed: int = 0,
    cache_dir: str = DEFAULT_CACHE_DIR,
) -> SmallCapModel:
    """Joins a vision encoder and a language model; the cross-attention between them is new.

    Args:
        vision_encoder: Folder, URI or hub id of a CLIP from transformers, or of its vision tower alone.
        decoder: Folder, URI or hub id of a GPT-2, OPT or XGLM.
        reduce_factor: Factor by which the cross-attention's heads are smaller than the decoder's.
        retrieval_encoder: Spec of the retrieval encoder that the checkpoint names.
        k: Retrieved captions per prompt; 0 makes a model without retrieval.
        eos_token: Token of the decoder's vocabulary that ends a caption.
        pad_token: Token of the decoder's vocabulary that fills batches.
        seed: Seed of the cross-attention's initial weights.
        cache_dir: This node's cache folder, for copies of what is remote.

    Returns:
        The model in float32 on the CPU, in eval mode, all parameters frozen.

    Raises:
        CheckpointError: A model cannot be found, is of an unknown kind, or is incomplete.
        ConfigError: The models or the reduce factor do not fit together.
    """
    vision, vision_config = _load_vision(vision_encoder, cache_dir)
    language_model, kind = _load_language_model(decoder, cache_dir)
    values = language_model.config.to_dict() | {
        "encoder_hidden_size": vision_config["hidden_size"],
        "cross_attention_reduce_factor": reduce_factor,
    }
    parsed = DECODER_KINDS[kind].parse_config(values)
    _check_sizes(parsed, vision_config["hidden_size"])
    tokenizer = load_tokenizer(decoder, cache_dir)
    vocabulary = tokenizer.get_vocab()
    config = SmallCapConfig(
        encoder={"vision_config": {"model_type": "clip_vision_model", **vision_config}},
        decoder=parsed,
        eos_token_id=_token_id(vocabulary, eos_token, decoder),
        pad_token_id=_token_id(vocabulary, pad_token, decoder),
        k=k or 4,
        rag=k > 0,
        retrieval_encoder=retrieval_encoder,
        bos_token_id=language_model.config.bos_token_id if DECODER_KINDS[kind].prompts_start_with_bos else None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallCapModel(config)
    model.encoder.transformer.load_state_dict(vision.state_dict())
    _fill_decoder(model, language_model, decoder)
    model.model_id = joined_model_id(vision_encoder, decoder, cache_dir)
    return model.eval().requires_grad_(False)


def _load_vision(source: str, cache_dir: str) -> tuple[nn.Module, dict[str, Any]]:
    """Returns a CLIP's vision tower and its sizes."""
    folder = resolve_folder(source, "clip", cache_dir)
    loaded = _load(_VISION_MODELS[_model_type(folder, source, _VISION_MODELS)], folder, source)
    config = getattr(loaded.config, "vision_config", loaded.config)
    tower = cast("nn.Module", getattr(loaded, "vision_model", loaded))  # not nested in the newest transformers
    return tower, {name: getattr(config, name) for name in _VISION_SIZES}


def _load_language_model(source: str, cache_dir: str) -> tuple[PreTrainedModel, str]:
    """Returns a transformers language model, and the kind of decoder that it becomes."""
    folder = resolve_folder(source, "smallcap", cache_dir)
    kind = LANGUAGE_MODELS[_model_type(folder, source, LANGUAGE_MODELS)]
    return _load(kind.model, folder, source), kind.decoder


def _model_type(folder: Path, source: str, known: dict[str, Any]) -> str:
    try:
        model_type = json.loads((folder / "config.json").read_bytes())["model_type"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            "This folder does not hold a transformers model.",
            where=source,
            expected="config.json with a model_type",
            found=f"{type(error).__name__}: {error}",
        ) from error
    if model_type not in known:
        raise CheckpointError(
            "A model of this kind cannot be used here.", where=source, expected=" or ".join(known), found=model_type
        )
    return str(model_type)


def _load(kind: type[PreTrainedModel], folder: Path, source: str) -> PreTrainedModel:
    """Loads a transformers model and checks that no weights are missing, which transformers would make up."""
    weights_file(folder)
    try:
        model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CheckpointError("The model cannot be loaded.", where=source, found=str(error)) from error
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            "The model's weights are incomplete.", where=source, found=f"{len(missing)} missing, such as {missing[0]}"
        )
    return cast("PreTrainedModel", model)


def _check_sizes(decoder: DecoderConfig, vision_hidden_size: int) -> None:
    if decoder.encoder_hidden_size != vision_hidden_size:
        raise ConfigError(
            "The vision encoder does not fit this kind of decoder.",
            where=decoder.model_type,
            expected=f"hidden size {decoder.encoder_hidden_size}, which the reference fixes for OPT and XGLM",
            found=str(vision_hidden_size),
            remedy="Use a ViT-B, or a GPT-2.",
        )
    if decoder.head_dim % decoder.cross_attention_reduce_factor:
        raise ConfigError(
            "The reduce factor does not divide the decoder's head size.",
            where="reduce_factor",
            expected=f"a divisor of {decoder.head_dim}",
            found=str(decoder.cross_attention_reduce_factor),
        )


def _fill_decoder(model: SmallCapModel, language_model: PreTrainedModel, source: str) -> None:
    """Copies the language model's weights; all other weights must belong to the cross-attention."""
    tensors = language_model.state_dict()
    head = tensors.pop("lm_head.weight")
    outcome = model.decoder.load_state_dict(tensors, strict=False)
    new = [name for name in outcome.missing_keys if "cross" not in name and "encoder_attn" not in name]
    if new or outcome.unexpected_keys:
        raise CheckpointError(
            "The language model's weights do not match its config.",
            where=source,
            found=", ".join([*new, *outcome.unexpected_keys][:3]),
        )
    if not torch.equal(head, model.decoder.token_embedding):
        raise CheckpointError(
            "The output embedding differs from the input embedding.", where=source, expected="tied embeddings"
        )


def _token_id(vocabulary: dict[str, int], token: str, source: str) -> int:
    if token not in vocabulary:
        raise ConfigError(
            "The decoder's vocabulary has no such token.", where=source, expected="one of its tokens", found=token
        )
    return vocabulary[token]
