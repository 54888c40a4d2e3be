"""Sets where the demo's cross-attention starts: whitened patches, and values near the embeddings of the nouns.

Two steps are meant to speed up training; their gains have not been measured separately. The patches are whitened,
because their spread differs between directions by a factor of a thousand; at the end the whitening is folded into the
weights. The values of the last layer start at the linear map from patches to noun embeddings that fits the training
scenes best. Both change where training starts and how it proceeds, not what is trained.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from demo.data import object_table, region_masks
from demo.world import Scene
from smallcap.model.checkpoint import SmallCapModel
from smallcap.model.gpt2 import Block, CrossAttention, GPT2Decoder


@dataclass(frozen=True)
class Whitening:
    """A linear map that gives the patches zero mean and unit spread in every direction.

    Attributes:
        mean: [Hv].
        matrix: [Hv, Hv], symmetric.
    """

    mean: Tensor
    matrix: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Whitening":
        """Measures the map on [N, P, Hv] features."""
        rows = features.float().flatten(0, 1)
        spread, axes = torch.linalg.eigh(torch.cov(rows.T))
        return cls(rows.mean(0), (axes * (spread + 1e-3 * spread.mean()).rsqrt()) @ axes.T)

    def apply(self, features: Tensor, rows_at_once: int = 1_000) -> Tensor:
        """Returns [N, P, Hv] whitened features in bf16."""
        chunks = torch.split(features, rows_at_once)
        return torch.cat([((chunk.float() - self.mean) @ self.matrix).bfloat16() for chunk in chunks])

    @torch.no_grad()
    def fold_into(self, model: SmallCapModel) -> None:
        """Lets a cross-attention that was trained on whitened features take the encoder's unchanged ones."""
        for attention in cross_attentions(model):
            projection = attention.c_attn
            projection.bias.sub_(self.mean @ self.matrix @ projection.weight)
            projection.weight.copy_(self.matrix @ projection.weight)


def cross_attentions(model: SmallCapModel) -> list[CrossAttention]:
    """Returns the cross-attention of each layer of a model whose decoder is GPT-2."""
    decoder = model.decoder
    assert isinstance(decoder, GPT2Decoder)
    return [block.crossattention for block in cast("Iterable[Block]", decoder.transformer.h)]


@torch.no_grad()
def start_at_nouns(
    model: SmallCapModel, features: Tensor, scenes: Sequence[Scene], noun_ids: Sequence[int], scale: float
) -> None:
    """Sets the last cross-attention's values to the ridge regression from patches to the embeddings of their nouns.

    Where the cross-attention is narrower than the decoder, the values keep the regression's first principal directions.

    Args:
        model: The model, whose cross-attention is changed in place.
        features: [N, 1 + grid * grid, Hv] whitened features of the scenes.
        scenes: N scenes; kinds that none of them holds are not used.
        noun_ids: The token id of each kind's noun, in the order of the table.
        scale: A factor on the targets of the regression.
    """
    kinds, places = object_table(scenes)
    patches = features[:, 1:].float()
    inside = (region_masks(places, round(patches.shape[1] ** 0.5)) > 0) & (kinds >= 0)[..., None]  # [N, 3, patches]
    kind_of = torch.where(inside, kinds.clamp(min=0)[..., None], -1).amax(1)  # [N, patches]
    nouns = model.decoder.token_embedding[list(noun_ids)]
    nouns = nouns - nouns[torch.unique(kinds[kinds >= 0])].mean(0)
    on_objects, on_ground = patches[kind_of >= 0], patches[kind_of < 0]
    on_ground = on_ground[torch.randperm(len(on_ground))[: len(on_objects) // 2]]
    sources = torch.cat([on_objects, on_ground])
    targets = scale * torch.cat([nouns[kind_of[kind_of >= 0]], torch.zeros(len(on_ground), nouns.shape[1])])
    centred = sources - sources.mean(0)
    covariance = centred.T @ centred / len(centred)
    ridge = 1e-3 * covariance.diagonal().mean() * torch.eye(len(covariance))
    weight = torch.linalg.solve(covariance + ridge, centred.T @ (targets - targets.mean(0)) / len(centred))
    bias = targets.mean(0) - sources.mean(0) @ weight
    attention = cross_attentions(model)[-1]
    size = attention.c_proj.weight.shape[0]  # [size, hidden]
    dealt = (
        torch.arange(size).view(-1, attention.num_heads).T.flatten()
    )  # so that no head gets all the first directions
    directions = torch.linalg.svd(weight, full_matrices=False)[2][dealt].T  # [hidden, size], orthonormal
    attention.c_attn.weight[:, -size:] = weight @ directions
    attention.c_attn.bias[-size:] = bias @ directions
    attention.c_proj.weight.copy_(directions.T)
