"""A process's share of a GPU's memory, where several actors have one GPU.

What is free at an actor's start says little: the others may not have started, or not have taken what they need. torch's
allocator therefore keeps each to a share of the card's total. What an actor finds room for then does not depend on the
order in which they start. One that asks for more gets an `OutOfMemoryError`, instead of what another counts on.
"""

from __future__ import annotations

import torch

from smallcap.errors import ConfigError

# What a process has on a GPU beside torch's tensors: CUDA's context, and what its libraries load. An allowance, because
# it differs by card and driver.
_BESIDE_TENSORS_BYTES = 768 << 20


def limit_to_share(share: float) -> None:
    """Limits what this process takes of its GPU; call it before anything is loaded.

    Args:
        share: The share of the GPU's memory; 1 sets no limit.

    Raises:
        ConfigError: The share is too small for any model.
    """
    if share >= 1:
        return
    total = torch.cuda.mem_get_info()[1]
    limit = int(total * share) - _BESIDE_TENSORS_BYTES
    if limit <= 0:
        raise ConfigError(
            "An actor's share of the GPU's memory is too small.",
            where="compute.gpus_per_actor",
            expected=f"more than {_BESIDE_TENSORS_BYTES / total:.2f}",
            found=f"{share:g}",
            remedy="Let fewer actors share the GPU.",
        )
    torch.cuda.set_per_process_memory_fraction(limit / total)


def set_aside(taken_bytes: int, device: torch.device) -> None:
    """Takes what another library than torch holds on a GPU off this process's share, if it is limited to one."""
    card = _card_number(device)
    limit = torch.cuda.get_per_process_memory_fraction(card)
    if limit < 1:
        taken = taken_bytes / torch.cuda.mem_get_info(card)[1]
        torch.cuda.set_per_process_memory_fraction(max(0.0, limit - taken), card)


def room_bytes(device: torch.device) -> int:
    """Returns how much memory of a GPU this process can still take: what is free, and within its share."""
    card = _card_number(device)
    free, total = torch.cuda.mem_get_info(card)
    limit = torch.cuda.get_per_process_memory_fraction(card)
    if limit >= 1:
        return free
    # What torch keeps for reuse is free for this process as well. With it the share decides, and not the order.
    allocated = torch.cuda.memory_allocated(card)
    kept = torch.cuda.memory_reserved(card) - allocated
    return max(0, min(free + kept, int(total * limit) - allocated))


def _card_number(device: torch.device) -> int:
    """Returns a GPU's number; torch's functions for a process's share refuse a device without one."""
    return torch.cuda.current_device() if device.index is None else device.index
