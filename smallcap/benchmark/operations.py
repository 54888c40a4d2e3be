"""Counts the operations that captioning one image needs; a multiplication and an addition are two.

Only what the algorithm needs counts. Padded prompts, masked slots and all work besides matrix products do not, so that
the share of the measured matrix rate is not flattered. torch counts CLIP's text encoder and open_clip's models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from smallcap.captioner import Captioner
from smallcap.decoding.text_decoder import DecoderConfig
from smallcap.model.checkpoint import SmallCapModel


def vision_flops(model: SmallCapModel) -> float:
    """Returns the operations of the vision encoder."""
    config = model.config.vision
    hidden, patch = config["hidden_size"], config["patch_size"]
    tokens = _encoder_tokens(model)
    patches = tokens - 1
    layer = 4 * hidden**2 + 2 * hidden * config["intermediate_size"] + 2 * tokens * hidden
    return 2.0 * (patches * 3 * patch**2 * hidden + config["num_hidden_layers"] * tokens * layer)


def retrieval_flops(captioner: Captioner) -> float:
    """Returns the operations of the retrieval encoder: a projection if it shares the vision encoder's pass."""
    encoder = captioner.retrieval_encoder
    assert encoder is not None
    if captioner.shares_encoder:
        return 2.0 * captioner.model.config.decoder.encoder_hidden_size * encoder.dim
    size = encoder.preprocessing.size_px
    pixels = torch.zeros(1, 3, size, size, device=encoder.device, dtype=captioner.model.dtype)
    return torch_flops(lambda: encoder.encode_images(pixels))


def torch_flops(call: Callable[[], object]) -> float:
    """Returns the operations of a call as torch counts them: all matrix products and convolutions, padding included."""
    packed = {torch.ops.mkldnn._linear_pointwise: _packed_linear_flops}  # not in torch's own table
    with FlopCounterMode(display=False, custom_mapping=packed) as counter:
        call()
    return float(counter.get_total_flops())


def _packed_linear_flops(x_shape: Sequence[int], weight_shape: Sequence[int], *_: object, **__: object) -> int:
    return 2 * math.prod(x_shape) * weight_shape[0]


def prefill_flops(model: SmallCapModel, prompt_tokens: int) -> float:
    """Returns the operations for the image's cross-attention keys and values, the prompt, and the first logits.

    The last layer computes keys and values of the whole prompt, and the rest only for its last token.
    """
    config = model.config.decoder
    projected = 2.0 * _encoder_tokens(model) * config.encoder_hidden_size * 2 * config.cross_attention_size
    causal = prompt_tokens * (prompt_tokens + 1) / 2  # pairs of tokens that attend
    inner_layer = prompt_tokens * _token_flops(model) + 4.0 * causal * config.hidden_size
    keys_and_values = 2.0 * (prompt_tokens - 1) * 2 * config.hidden_size**2
    last_layer = keys_and_values + _token_flops(model) + 4.0 * prompt_tokens * config.hidden_size
    return config.num_layers * projected + (config.num_layers - 1) * inner_layer + last_layer + _head_flops(config)


def decode_flops(model: SmallCapModel, prompt_tokens: int, length: int, num_beams: int) -> float:
    """Returns the operations of all steps after the first token of a caption of `length` tokens."""
    config = model.config.decoder
    total = 0.0
    for step in range(1, length):
        attention = 4.0 * (prompt_tokens + step) * config.hidden_size
        total += num_beams * (config.num_layers * (_token_flops(model) + attention) + _head_flops(config))
    return total


def _token_flops(model: SmallCapModel) -> float:
    """Returns the operations of one token in one layer, self-attention's scores excluded."""
    config = model.config.decoder
    hidden, cross = config.hidden_size, config.cross_attention_size
    weights = 4 * hidden**2 + 2 * hidden * cross + 2 * hidden * config.ffn_size
    return 2.0 * weights + 4.0 * _encoder_tokens(model) * cross


def _head_flops(config: DecoderConfig) -> float:
    return 2.0 * config.hidden_size * config.vocab_size


def _encoder_tokens(model: SmallCapModel) -> int:
    config = model.config.vision
    return int((config["image_size"] // config["patch_size"]) ** 2 + 1)
