"""Holds rendered scenes as one array, and the places of their objects on the patch grid."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

from demo.render import render_crop
from demo.world import Scene, SceneSet, load_kinds, sample_scene

IMAGE_PX = 96
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_OBJECTS = 3


def _render_chunk(seeds: Sequence[int], side_px: int) -> np.ndarray:
    return np.stack([render_crop(sample_scene(seed), side_px) for seed in seeds])


def render_pool(scenes: SceneSet, count: int, folder: Path, workers: int = 2) -> np.ndarray:
    """Renders the first `count` scenes of a set to a file in `folder`; an existing file is used.

    Returns:
        uint8 [count, IMAGE_PX, IMAGE_PX, 3], memory-mapped.
    """
    path = folder / f"scenes-{scenes.name}-{count}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        chunks = [scenes.seeds[i : min(i + 250, count)] for i in range(0, count, 250)]
        with ProcessPoolExecutor(workers) as pool:
            images = np.concatenate(list(pool.map(partial(_render_chunk, side_px=IMAGE_PX), chunks)))
        partial_path = path.with_suffix(".partial.npy")
        np.save(partial_path, images)
        partial_path.rename(path)
    return np.load(path, mmap_mode="r")


def normalise(images: np.ndarray) -> torch.Tensor:
    """Converts uint8 [B, S, S, 3] to CLIP's normalised float32 [B, 3, S, S]."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(CLIP_MEAN).view(1, 3, 1, 1)) / torch.tensor(CLIP_STD).view(1, 3, 1, 1)


def object_table(scenes: Sequence[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the kinds [N, 3] (-100 where there is no object) and the places [N, 3, 3] (x, y, scale)."""
    index_of = {kind.noun: i for i, kind in enumerate(load_kinds())}
    kinds = torch.full((len(scenes), MAX_OBJECTS), -100)
    places = torch.zeros(len(scenes), MAX_OBJECTS, 3)
    for row, scene in enumerate(scenes):
        for column, placed in enumerate(scene.objects):
            kinds[row, column] = index_of[placed.kind.noun]
            places[row, column] = torch.tensor([placed.x, placed.y, placed.scale])
    return kinds, places


def region_masks(places: torch.Tensor, grid: int) -> torch.Tensor:
    """Returns weights that average the patches in the middle of each object; [B, 3, grid * grid], rows sum to 1."""
    centres = (torch.arange(grid) + 0.5) / grid
    x, y, scale = places.unbind(-1)  # each [B, 3]
    reach = (scale * 0.35).clamp_min(0.55 / grid)[..., None]
    near_x = (centres - x[..., None]).abs() <= reach  # [B, 3, grid]
    near_y = (centres - y[..., None]).abs() <= reach
    mask = (near_y[..., :, None] & near_x[..., None, :]).flatten(-2).float()
    return mask / mask.sum(-1, keepdim=True).clamp_min(1)
