import numpy as np
import pytest
from PIL import Image

from smallcap.errors import ErrorCode, RowError
from smallcap.images.crops import CropPlan
from smallcap.images.decode import Preprocessing, decode_image
from tests.bad_images import encode

RAMP = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
BYTES = RAMP * 255


def grey(values: np.ndarray, kind: str = "TIFF") -> np.ndarray:
    """[H, W] int of an image of these values, as it is decoded."""
    pixels = np.asarray(decode_image(encode(Image.fromarray(values), kind)), int)
    assert (pixels == pixels[:, :, :1]).all()
    return pixels[:, :, 0]


@pytest.mark.parametrize(
    "values",
    [
        RAMP,
        RAMP * 255,
        RAMP * 65535,
        RAMP * 1.5,  # no usual range: its own
        RAMP * 4000,
        RAMP * 2 - 1,
        RAMP * 1e-20,
        (RAMP - 0.5) * 3e38,
        (RAMP * 65535).astype(np.uint16),
        (RAMP * 4095).astype(np.uint16),  # 12 bits
        (RAMP * 255).astype(np.int32),
        (RAMP * 65535).astype(np.int32),
        (RAMP * 2**30).astype(np.int32),
    ],
    ids=lambda values: f"{values.dtype} from {values.min():.3g} to {values.max():.3g}",
)
def test_wide_grey_values_fill_the_range_from_black_to_white(values: np.ndarray) -> None:
    assert np.abs(grey(values) - BYTES).max() <= 2


def test_a_usual_range_is_kept_by_an_image_that_does_not_fill_it() -> None:
    assert np.abs(grey(RAMP * 128) - BYTES * 128 / 255).max() <= 1
    assert np.abs(grey(RAMP * 0.5) - BYTES * 0.5).max() <= 1


def test_the_range_of_sixteen_bits_is_that_of_the_formats_that_have_one() -> None:
    dark = (RAMP * 4095).astype(np.uint16)
    assert np.abs(grey(dark, "PNG") - BYTES * 4095 / 65535).max() <= 1


def test_what_is_no_number_is_black_or_white() -> None:
    values = RAMP.copy()
    values[0, :3] = np.nan, np.inf, -np.inf
    assert grey(values)[0, :3].tolist() == [0, 255, 0]
    assert not grey(np.full((8, 8), np.nan, np.float32)).any()
    assert not grey(np.zeros((8, 8), np.float32)).any()


def test_pixels_without_a_conversion_are_unsupported() -> None:
    with pytest.raises(RowError, match="type La") as caught:
        CropPlan.of(Preprocessing(8), None).crop(Image.new("La", (8, 8)))
    assert caught.value.code == ErrorCode.UNSUPPORTED


def test_an_image_in_memory_is_scaled_as_one_in_a_file() -> None:
    crop = CropPlan.of(Preprocessing(64), None).crop(Image.fromarray(RAMP)).vision
    assert np.abs(crop[:, :, 0] - BYTES).max() <= 2
