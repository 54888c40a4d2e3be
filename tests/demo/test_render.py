"""Rendering; skipped where the font is not installed."""

import io

import numpy as np
import pytest
from PIL import Image

from demo.render import SCENE_PX, encode_jpeg, find_font, render_crop, render_scene
from demo.world import sample_scene

pytestmark = pytest.mark.skipif(find_font() is None, reason="the Noto Color Emoji font is not installed")


def test_the_same_scene_gives_the_same_picture() -> None:
    assert encode_jpeg(sample_scene(3)) == encode_jpeg(sample_scene(3))


def test_a_jpeg_decodes_to_the_scene_within_its_loss() -> None:
    scene = sample_scene(5)
    decoded = Image.open(io.BytesIO(encode_jpeg(scene)))
    assert decoded.size == (SCENE_PX, SCENE_PX)
    difference = np.asarray(decoded).astype(int) - np.asarray(render_scene(scene)).astype(int)
    assert np.abs(difference).mean() < 6


def test_the_objects_change_the_ground() -> None:
    scene = sample_scene(8)
    empty = type(scene)(scene.seed, scene.ground, scene.layout, ())
    changed = np.abs(render_crop(scene, 96).astype(int) - render_crop(empty, 96).astype(int)).sum(-1) > 60
    assert 0.02 < changed.mean() < 0.6
