"""Draws scenes with Noto Color Emoji. Only this module needs the font, and only new data needs this module.

The font (SIL Open Font License 1.1) is found by name in the usual font folders. On Debian: fonts-noto-color-emoji.
"""

import io
import random
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from demo.world import GROUNDS, Kind, Scene

FONT_NAME = "NotoColorEmoji.ttf"
FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts", "/Library/Fonts")
STRIKE_PX = 109  # the one bitmap size that the font holds
SCENE_PX = 192


def find_font() -> Path | None:
    """Returns the font's file, or None where it is not installed."""
    for folder in FONT_FOLDERS:
        for path in sorted(Path(folder).expanduser().rglob(FONT_NAME)):
            return path
    return None


@cache
def _font() -> ImageFont.FreeTypeFont:
    path = find_font()
    if path is None:
        raise FileNotFoundError(
            f"{FONT_NAME} is in none of {', '.join(FONT_FOLDERS)}; install it (Debian: fonts-noto-color-emoji)"
        )
    return ImageFont.truetype(str(path), STRIKE_PX)


@cache
def _sprite(kind: Kind) -> Image.Image:
    """Returns the kind's bitmap, RGBA, cropped to what is drawn."""
    canvas = Image.new("RGBA", (STRIKE_PX * 2, STRIKE_PX * 2))
    ImageDraw.Draw(canvas).text((20, 20), kind.character, font=_font(), embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise ValueError(
            f"{FONT_NAME} draws nothing for {kind.noun} (U+{ord(kind.character):X}); choose another code point"
        )
    return canvas.crop(box)


def render_scene(scene: Scene, side_px: int = SCENE_PX) -> Image.Image:
    """Draws the scene as an RGB image of `side_px` x `side_px`; the same scene gives the same pixels."""
    rng = np.random.default_rng(scene.seed)
    image = _ground(scene.ground, side_px, rng)
    for placed in scene.objects:
        sprite = _sprite(placed.kind)
        factor = placed.scale * side_px / max(sprite.size)
        width, height = (max(1, round(length * factor)) for length in sprite.size)
        sprite = sprite.resize((width, height), Image.Resampling.BICUBIC)
        sprite = sprite.rotate(placed.tilt, Image.Resampling.BICUBIC, expand=True)
        corner = (round(placed.x * side_px - sprite.width / 2), round(placed.y * side_px - sprite.height / 2))
        image.paste(sprite, corner, sprite)
    return image


def _ground(name: str, side_px: int, rng: np.random.Generator) -> Image.Image:
    """Returns a ground: a colour near the named one, with a gradient in one direction and some grain."""
    colour = np.array(GROUNDS[name], np.float32) + rng.uniform(-12, 12, 3)
    ramp = np.linspace(-1, 1, side_px, dtype=np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    fall = np.cos(angle) * ramp[None, :] + np.sin(angle) * ramp[:, None]
    grain = rng.normal(0, 3, (side_px, side_px)).astype(np.float32)
    pixels = colour + (fall * rng.uniform(5, 18) + grain)[:, :, None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode_jpeg(scene: Scene) -> bytes:
    """Returns the rendered scene as JPEG bytes, with a quality that depends on the scene."""
    buffer = io.BytesIO()
    render_scene(scene).save(buffer, "JPEG", quality=random.Random(scene.seed).randint(75, 95))
    return buffer.getvalue()


def render_crop(scene: Scene, side_px: int) -> np.ndarray:
    """Returns what the vision encoder sees: the JPEG, decoded and resized; uint8 [side_px, side_px, 3]."""
    image = Image.open(io.BytesIO(encode_jpeg(scene))).convert("RGB")
    return np.asarray(image.resize((side_px, side_px), Image.Resampling.BICUBIC))
