"""The self-attention cache of a beam search: preallocated, and with nothing stored twice.

Keys and values lie in *slots* along the T axis. The prompt fills the first S slots once per image, and all beams of the
image read them there. After that each step appends N slots, one per beam, and a boolean matrix says which slots are on
the path of which beam. Choosing beams therefore permutes rows of that small matrix and moves no keys or values.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from smallcap.machine.shapes import row_on_gpu


class KeyValueSlots(Protocol):
    """What a decoder's self-attention needs from a cache."""

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores [B, H, new, D] keys and values of one layer; returns all that the new tokens may attend to."""

    def advance(self, new_slots: int) -> None:
        """Counts the slots that every layer has just stored."""


class KVCache:
    """Keys and values of B images with N beams each, for all layers of a decoder.

    On a GPU a step attends to a few more slots than are filled, which no beam sees: the mask's rows then have a length
    for which matrix products are fast.

    Attributes:
        keys, values: [L, B, H, T, D], where T = S + N * steps, rounded up on a GPU.
        visible: [B, N, T] bool, the slots that each beam attends to.
        length: Slots that are filled.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],  # L layers, H heads, D head dim
        prompt_mask: Tensor,  # [B, S] bool, False at the left padding
        num_beams: int,
        max_steps: int,
        dtype: torch.dtype,
    ) -> None:
        num_layers, num_heads, head_dim = shape
        batch, prompt_tokens = prompt_mask.shape
        device = prompt_mask.device
        self._on_gpu = device.type == "cuda"
        slots = self._whole_row(prompt_tokens + num_beams * max_steps)
        # Zeros: what nothing has filled is attended to with a weight of 0, and 0 * NaN would be NaN.
        make = torch.zeros if self._on_gpu else torch.empty
        self.keys, self.values = (
            make(num_layers, batch, num_heads, slots, head_dim, dtype=dtype, device=device) for _ in range(2)
        )
        self.visible = torch.zeros(batch, num_beams, slots, dtype=torch.bool, device=device)
        self.visible[:, :, :prompt_tokens] = prompt_mask[:, None]
        self.num_beams = num_beams
        self.length = prompt_tokens

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one layer's new slots after the filled ones and returns all filled slots, on a GPU a whole row.

        Args:
            layer: Index of the layer.
            keys: [B, H, new, D].
            values: [B, H, new, D].

        Returns:
            Keys and values [B, H, length + new, D], as views. `length` itself grows in `advance`, after the last layer.
        """
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        end = self._whole_row(end)
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def _whole_row(self, slots: int) -> int:
        return row_on_gpu(slots) if self._on_gpu else slots

    def advance(self, new_slots: int) -> None:
        """Counts the slots that every layer has just stored."""
        self.length += new_slots

    def open_step(self, parents: Tensor) -> Tensor:
        """Lets each beam continue from its parent, and see the slot it is about to store.

        Args:
            parents: [B, N] int64, the beam that each new beam extends.

        Returns:
            [B, N, length + N] bool, on a GPU a whole row of them: the attention mask of the step.
        """
        end = self.length + self.num_beams
        inherited = self.visible[:, :, : self.length]
        index = parents[:, :, None].expand_as(inherited)
        self.visible[:, :, : self.length] = inherited.gather(1, index)
        own_slot = torch.eye(self.num_beams, dtype=torch.bool, device=self.visible.device)
        self.visible[:, :, self.length : end] = own_slot
        return self.visible[:, :, : self._whole_row(end)]

    def keep(self, rows: Tensor) -> None:
        """Drops all images but `rows` ([kept] int64); their filled slots are copied together."""
        make = self.keys.new_zeros if self._on_gpu else self.keys.new_empty
        kept_keys, kept_values = (make(self.keys.shape[0], len(rows), *self.keys.shape[2:]) for _ in range(2))
        kept_keys[:, :, :, : self.length] = self.keys[:, rows, :, : self.length]
        kept_values[:, :, :, : self.length] = self.values[:, rows, :, : self.length]
        self.keys, self.values = kept_keys, kept_values
        self.visible = self.visible[rows]


class PromptSlots:
    """The slots of a cache that the prompts of some images fill: the last `length` of the S prompt slots."""

    def __init__(self, cache: KVCache, rows: slice, length: int) -> None:
        prompt_tokens = cache.length
        slots = slice(prompt_tokens - length, prompt_tokens)
        self._keys, self._values = cache.keys[:, rows, :, slots], cache.values[:, rows, :, slots]
        for unused in (cache.keys, cache.values):  # never attended to, but 0 * NaN would be NaN
            unused[:, rows, :, : prompt_tokens - length] = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one layer's keys and values [B, H, length, D]; prompts attend to nothing before themselves."""
        self._keys[layer], self._values[layer] = keys, values
        return keys, values

    def advance(self, new_slots: int) -> None:
        """Does nothing: a prompt is stored at once."""
