"""SmallCap's training objective: cross-entropy on the caption's tokens, for the cross-attention's parameters only.

Source: Ramos et al. 2023, section 3.3; RitaRamo/smallcap train.py and src/utils.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smallcap.engine import additive_mask
from smallcap.prompt import IGNORED_LABEL
from smallcap.text_decoder import TextDecoder


def freeze_all_but_cross_attention(decoder: TextDecoder) -> list[nn.Parameter]:
    """Freezes the decoder's language model and returns the parameters to train."""
    decoder.requires_grad_(False)
    trained = list(decoder.cross_attention_parameters().values())
    for parameter in trained:
        parameter.requires_grad_(True)
    return trained


def collate(examples: Sequence[tuple[list[int], list[int]]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Pads (input ids, labels) pairs on the right; returns two [B, S] int64 tensors."""
    length = max(len(input_ids) for input_ids, _ in examples)
    inputs = [input_ids + [pad_token_id] * (length - len(input_ids)) for input_ids, _ in examples]
    labels = [labels + [IGNORED_LABEL] * (length - len(labels)) for _, labels in examples]
    return torch.tensor(inputs), torch.tensor(labels)


def caption_loss(decoder: TextDecoder, encoder_hidden_states: Tensor, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean cross-entropy over the labelled positions.

    Args:
        decoder: The text decoder; in train mode its dropout is active.
        encoder_hidden_states: [B, P, Hv], in the decoder's dtype.
        input_ids: [B, S] int64, padded on the right: what is padded follows all that is labelled.
        labels: [B, S] int64, -100 where nothing is learnt; not shifted.

    Returns:
        A scalar, in nats per token.
    """
    batch, length = input_ids.shape
    position_ids = torch.arange(length, device=input_ids.device).expand(batch, length)
    before = torch.ones(1, 1, length, length, dtype=torch.bool, device=input_ids.device).tril()
    mask = additive_mask(before, encoder_hidden_states.dtype)
    hidden = decoder(input_ids, position_ids, mask, decoder.cross_attention_kv(encoder_hidden_states))
    labelled = labels != IGNORED_LABEL
    return F.cross_entropy(decoder.logits(hidden[labelled]).float(), labels[labelled])
