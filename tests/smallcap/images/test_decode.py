from functools import partial

import numpy as np
import pytest
from PIL import Image

from smallcap.errors import RowError
from smallcap.images.decode import Preprocessing, crop_pixels, decode_image, decode_scaled
from tests.bad_images import BAD_IMAGES, PNG, encode, gradient


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_a_row_error_with_its_code(name: str) -> None:
    data, code = BAD_IMAGES[name]
    for decode in (decode_image, partial(decode_scaled, least_px=10)):
        with pytest.raises(RowError) as caught:
            decode(data, where="s3://bucket/bad.jpg")
        assert caught.value.code == code
        assert "s3://bucket/bad.jpg" in str(caught.value)


def test_every_mode_becomes_rgb() -> None:
    image = decode_image(encode(gradient(64, 64).convert("CMYK"), "JPEG", quality=95))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image, int) - np.asarray(gradient(64, 64), int)).mean() < 12
    assert decode_image(encode(gradient(40, 40).quantize(16), "PNG", transparency=0)).mode == "RGB"
    assert decode_image(encode(gradient(40, 40).convert("LA"), "PNG")).mode == "RGB"
    no_numbers = decode_image(encode(Image.fromarray(np.full((8, 8), np.nan, np.float32)), "TIFF"))
    assert no_numbers.getpixel((4, 4)) == (0, 0, 0)


def test_sixteen_bit_png_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    pixels = np.asarray(decode_image(encode(Image.fromarray(ramp), "PNG")))
    assert pixels.shape == (64, 64, 3)
    assert np.abs(pixels[:, :, 0].astype(int) - (ramp / 257).astype(int)).max() <= 1


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    red, blue = Image.new("RGB", (32, 32), (255, 0, 0)), Image.new("RGB", (32, 32), (0, 0, 255))
    image = decode_image(encode(red, kind, save_all=True, append_images=[blue]))
    assert np.abs(np.subtract(image.getpixel((16, 16)), (255, 0, 0))).max() < 3


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_exif_rotation_is_applied(orientation: int) -> None:
    upright = gradient(600, 400)
    turned = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(upright.transpose(turned[orientation]), "JPEG", quality=95, exif=exif)
    image = decode_image(data)
    assert image.size == upright.size
    assert np.abs(np.asarray(image, int) - np.asarray(upright, int)).mean() < 4
    scaled = decode_scaled(data, 100)
    assert (scaled.width, scaled.height) == upright.size
    assert scaled.image.size == (150, 100)
    assert np.abs(np.asarray(scaled.image, int) - np.asarray(upright.resize((150, 100)), int)).mean() < 4


def test_scaled_decoding_keeps_the_encoders_pixels() -> None:
    photo = gradient(1000, 800)
    for image in (photo, photo.convert("L")):
        scaled = decode_scaled(encode(image, "JPEG", quality=95), 224)
        assert not scaled.by_pillow
        assert min(scaled.image.size) >= 224
        assert max(scaled.image.size) < 400
        assert (scaled.width, scaled.height) == photo.size
        exact = crop_pixels(image.convert("RGB"), Preprocessing(224)).astype(int)
        assert np.abs(crop_pixels(scaled.image, Preprocessing(224)) - exact).mean() < 3


def test_what_only_pillow_decodes_is_left_to_it() -> None:
    for data in (PNG, encode(gradient(64, 64).convert("CMYK"), "JPEG", quality=95)):
        scaled = decode_scaled(data, 10)
        assert scaled.by_pillow
        assert np.array_equal(np.asarray(scaled.image), np.asarray(decode_image(data)))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (3, 50_000), (224, 224), (225, 224), (640, 427)])
def test_every_size_is_cropped_to_the_encoders(size: tuple[int, int]) -> None:
    pixels = crop_pixels(Image.new("RGB", size, (10, 20, 30)), Preprocessing(224))
    assert pixels.shape == (224, 224, 3)
    assert pixels.dtype == np.uint8
    assert (pixels == (10, 20, 30)).all()


@pytest.mark.parametrize("size", [(150, 200), (201, 150), (640, 427), (427, 640), (224, 224), (500, 333), (337, 229)])
def test_crops_are_those_of_transformers_clip_and_of_open_clip(size: tuple[int, int]) -> None:
    from open_clip.transform import image_transform
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image = gradient(*size)
    theirs = CLIPImageProcessorPil(do_normalize=False, do_rescale=False)(image, return_tensors="np")["pixel_values"][0]
    assert np.array_equal(crop_pixels(image, Preprocessing(224)), theirs.transpose(1, 2, 0).astype(np.uint8))
    scaled = image_transform(224, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))(image)  # [3, S, S], 0 to 1
    expected = (scaled.numpy().transpose(1, 2, 0) * 255).round().astype(np.uint8)
    assert np.array_equal(crop_pixels(image, Preprocessing(224, crop_rounding="nearest")), expected)


def test_the_pixel_limit_is_the_callers() -> None:
    decode_image(PNG, max_pixels=120 * 80)
    with pytest.raises(RowError, match="9,600 pixels; at most 9,599"):
        decode_image(PNG, max_pixels=120 * 80 - 1)
