"""Images as Python code has them: the same image in every form gives the same crops."""

import asyncio
import io
import os
import socketserver
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from smallcap import storage
from smallcap.errors import ErrorCode, RowError
from smallcap.images.crops import CropPlan, Pixels
from smallcap.images.decode import Preprocessing
from smallcap.images.given import crop_given
from tests.bad_images import encode, gradient
from tests.image_files import exif_block, jpeg_with_exif, orientation_entry

PLAN = CropPlan.of(Preprocessing(24), None)
PNG = encode(gradient(48, 32), "PNG")


def crop(*images: Any) -> list[Pixels | RowError]:
    return crop_given(images, PLAN, max_pixels=1_000_000, allow_private_hosts=True)  # the server is on loopback


def same(*crops: Pixels | RowError) -> bool:
    first, *others = crops
    assert isinstance(first, Pixels), first
    return all(
        isinstance(other, Pixels)
        and (other.width, other.height) == (first.width, first.height)
        and np.array_equal(other.vision, first.vision)
        for other in others
    )


class _Web(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/a.png" else 404)
        self.end_headers()
        self.wfile.write(PNG if self.path == "/a.png" else b"")

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Web) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_every_form_of_an_image_gives_its_crops(tmp_path: Path, web: str, s3: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    storage.write_bytes(f"{s3}/a.png", PNG)
    opened = Image.open(io.BytesIO(PNG))
    pixels = np.asarray(gradient(48, 32))
    named = [str(path), path, next(iter(os.scandir(tmp_path))), f"file://{path}", f"{s3}/a.png", f"{web}/a.png"]
    held = [PNG, bytearray(PNG), memoryview(PNG), opened, gradient(48, 32), pixels, pixels[:, ::-1][:, ::-1]]
    assert same(*crop(*named, *held))
    transparent = np.dstack([pixels, np.full((32, 48), 255, np.uint8)])
    assert same(*crop(PNG, transparent))
    assert same(*crop(pixels[:, :, 0], np.dstack([pixels[:, :, :1]] * 3)))
    assert same(*crop_given(np.stack([pixels, pixels]), PLAN, 1_000_000), *crop(PNG))
    assert same(*crop_given((one for one in (path, PNG)), PLAN, 1_000_000))


def test_names_of_bytes_that_are_no_text_are_found(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    path.write_bytes(PNG)
    (entry,) = os.scandir(os.fsencode(tmp_path))
    assert same(*crop(path, str(path), entry, PNG))


def test_in_a_notebook_whose_event_loop_runs_paths_are_fetched(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)

    async def cell() -> list[Pixels | RowError]:
        return crop(tmp_path / "a.png", PNG)

    assert same(*asyncio.run(cell()))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_an_opened_file_stands_upright_as_its_bytes_do(orientation: int) -> None:
    data = jpeg_with_exif(exif_block(orientation_entry(orientation)))
    opened = Image.open(io.BytesIO(data))
    assert same(*crop(data, opened))
    turned = io.BytesIO()
    gradient(48, 32).save(turned, "TIFF", exif=exif_block(orientation_entry(orientation)))
    assert same(*crop(turned.getvalue(), Image.open(turned)))
    copy = Image.open(io.BytesIO(data)).convert("RGB")  # its pixels are what the caller has made of them
    assert same(*crop(copy, np.asarray(copy)))


def test_what_cannot_be_read_is_an_error_among_the_others(tmp_path: Path, web: str) -> None:
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no image")
    truncated = Image.open(io.BytesIO(encode(gradient(480, 320), "JPEG")[:2000]))
    given = [tmp_path / "empty.jpg", tmp_path / "text.jpg", "nowhere.jpg", tmp_path, "", f"{web}/b.png", b"", b"x"]
    given += [truncated, np.zeros((0, 4, 3), np.uint8), Image.new("RGB", (0, 3)), "weird://a/b.jpg", "a\0b.jpg"]
    *errors, good = crop(*given, PNG)
    assert isinstance(good, Pixels)
    assert [error.code for error in errors if isinstance(error, RowError)] == [
        *(ErrorCode.EMPTY, ErrorCode.NOT_AN_IMAGE, ErrorCode.NOT_FOUND, ErrorCode.NOT_FOUND, ErrorCode.INVALID_URI),
        *(ErrorCode.NOT_FOUND, ErrorCode.EMPTY, ErrorCode.NOT_AN_IMAGE, ErrorCode.TRUNCATED, ErrorCode.EMPTY),
        *(ErrorCode.EMPTY, ErrorCode.INVALID_URI, ErrorCode.INVALID_URI),
    ]
    places = [error.where for error in errors if isinstance(error, RowError)]
    assert places[:4] == [f"{tmp_path}/empty.jpg", f"{tmp_path}/text.jpg", "nowhere.jpg", str(tmp_path)]
    assert places[6:9] == ["images[6]", "images[7]", "images[8]"]
    (large,) = crop_given([PNG], PLAN, max_pixels=100)
    assert isinstance(large, RowError) and large.code == ErrorCode.TOO_LARGE


class Tensor:
    """Looks like an array of another library."""

    shape, dtype = (3, 4, 4), "torch.float32"


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (None, "NoneType"),
        (7, "int"),
        (["a.jpg"], "list"),
        (np.zeros((4, 4, 3)), r"numpy.ndarray of float64 \[4, 4, 3\]"),
        (np.zeros((3, 8, 8), np.uint8), r"numpy.ndarray of uint8 \[3, 8, 8\]"),
        (np.zeros((4, 4, 1), np.uint8), r"numpy.ndarray of uint8 \[4, 4, 1\]"),
        (io.BytesIO(PNG), "_io.BytesIO"),
        (Tensor(), r"Tensor of torch.float32 \[3, 4, 4\]"),
    ],
    ids=["none", "int", "list", "floats", "channels first", "one channel", "file", "tensor"],
)
def test_what_is_no_image_is_a_type_error_that_says_what_was_given(image: Any, found: str) -> None:
    with pytest.raises(TypeError, match=rf"images\[1\]: expected a path or URI .*, found .*{found}"):
        crop(PNG, image)


@pytest.mark.parametrize(
    ("images", "found"),
    [
        ("a.jpg", "str.*write \\[image\\]"),
        (Path("a.jpg"), "Path.*write \\[image\\]"),
        (PNG, "bytes.*write \\[image\\]"),
        (gradient(4, 4), "Image.*write \\[image\\]"),
        (np.zeros((4, 4, 3), np.uint8), "ndarray.*write \\[image\\]"),
        (None, "NoneType"),
        (3, "int"),
        ({"a.jpg": 1}, "dict"),
    ],
    ids=["str", "path", "bytes", "pillow", "array", "none", "int", "dict"],
)
def test_one_image_in_place_of_several_is_a_type_error(images: Any, found: str) -> None:
    with pytest.raises(TypeError, match=f"(?s)expected a list.*found .*{found}"):
        crop_given(images, PLAN, 1_000_000)
