"""What decoding takes is known before, and the large images of a node wait for each other."""

from __future__ import annotations

import multiprocessing
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from smallcap.errors import ErrorCode, RowError
from smallcap.images import decoding_room as rooms
from smallcap.images.crops import CropPlan
from smallcap.images.decode import Preprocessing
from smallcap.images.decoding_room import OWN_BYTES, DecodingRoom, decoding_room
from smallcap.machine.process_memory import return_freed_memory, status_bytes
from tests.bad_images import encode, gradient, png_header
from tests.image_files import exif_block, orientation_entry

WIDTH, HEIGHT = 2400, 1600
PLAN = CropPlan(Preprocessing(32), None)


def large_file(name: str) -> bytes:
    """An image of four megapixels, which its decoder has to turn upright where the format can say so."""
    image, exif = gradient(WIDTH, HEIGHT), exif_block(orientation_entry(6))
    grey = np.linspace(0, 65535, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH)
    kind, _, special = name.partition(" ")
    special_images = {
        "16": lambda: Image.fromarray(grey.astype(np.uint16)),
        "32": lambda: Image.fromarray(grey.astype(np.int32)),
        "float": lambda: Image.fromarray(grey.astype(np.float32)),
        "grey": lambda: image.convert("L"),
        "alpha": lambda: image.convert("RGBA"),
        "CMYK": lambda: image.convert("CMYK"),
        "palette": lambda: image.convert("P"),
    }
    if special in special_images:
        image = special_images[special]()
    options: dict[str, Any] = {"JPEG": {"exif": exif}, "PNG": {"exif": exif, "compress_level": 1}}.get(kind, {})
    options |= {"WEBP": {"method": 0}, "AVIF": {"speed": 10}, "JPEG2000": {"num_resolutions": 2}}.get(kind, {})
    if special == "palette":
        options["transparency"] = 0
    if special == "progressive":
        options["progressive"] = True
    return encode(image, kind, **options)


def peak_of(data: bytes, reserved: list[int], monkeypatch: pytest.MonkeyPatch) -> int:
    """The bytes by which decoding an image has raised this process's memory at most."""
    monkeypatch.setattr(DecodingRoom, "take", lambda room, needed: reserved.append(needed))
    return_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (proc_pid_clear_refs(5))
    before = status_bytes("VmRSS") or 0
    PLAN.crop(data)
    return (status_bytes("VmHWM") or 0) - before


@pytest.mark.parametrize(
    "name",
    [
        *("JPEG", "JPEG progressive", "JPEG grey", "JPEG CMYK"),
        *("PNG", "PNG 16", "PNG palette", "PNG alpha", "PNG grey"),
        *("TIFF", "TIFF 16", "TIFF 32", "TIFF float", "TIFF alpha"),
        *("WEBP", "WEBP alpha", "AVIF", "JPEG2000", "GIF palette", "BMP", "PPM"),
    ],
)
def test_an_image_takes_no_more_than_is_reserved_for_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reserved: list[int] = []
    peak = peak_of(large_file(name), reserved, monkeypatch)
    (needed,) = reserved
    assert peak <= needed + (16 << 20)  # malloc keeps a little of what is freed
    assert needed <= 36 * WIDTH * HEIGHT + (1 << 20)


def test_a_long_and_narrow_image_reserves_what_it_becomes(monkeypatch: pytest.MonkeyPatch) -> None:
    reserved: list[int] = []
    peak = peak_of(encode(Image.new("RGB", (1, 20_000)), "PNG"), reserved, monkeypatch)
    assert 32 * 32 * 20_000 * 4 < peak <= reserved[0] + (8 << 20)


def test_a_photograph_of_a_usual_size_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "total_bytes", lambda: 0)
    reserved: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(DecodingRoom, "take", lambda room, needed: reserved.append(needed))
        with pytest.raises(RowError, match="ends early"):
            PLAN.crop(png_header(6000, 5000))
    assert reserved[0] <= OWN_BYTES
    DecodingRoom("a.png").take(reserved[0])


def test_an_image_that_needs_most_of_the_nodes_memory_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "total_bytes", lambda: 2 << 30)
    with pytest.raises(RowError, match=r"takes about 1\.9 GB; this node has 2\.1 GB \(a\.png\)") as error:
        PLAN.crop(png_header(15_500, 15_500), 10**9, "a.png")
    assert error.value.code == ErrorCode.TOO_LARGE


def _hold(slots: int, has: Event, let_go: Event) -> None:
    with decoding_room("a.png") as room:
        room.take(OWN_BYTES + slots * (256 << 20))
        has.set()
        let_go.wait(60)


def test_large_images_of_several_processes_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node has three slots. Two images fit, a third one waits; and a process that dies gives its room back."""
    monkeypatch.setattr(rooms, "_slots_file", lambda: tmp_path / "slots")
    monkeypatch.setattr(rooms, "total_bytes", lambda: 4 * 3 * (256 << 20))
    context = multiprocessing.get_context("fork")
    events = [(context.Event(), context.Event()) for _ in range(3)]
    processes = [
        context.Process(target=_hold, args=(slots, *pair)) for slots, pair in zip((2, 1, 3), events, strict=True)
    ]
    for process in processes[:2]:
        process.start()
    assert events[0][0].wait(60)
    assert events[1][0].wait(60)
    processes[2].start()
    assert not events[2][0].wait(0.3)
    events[1][1].set()
    assert not events[2][0].wait(0.3)  # it needs all three
    processes[0].kill()
    assert events[2][0].wait(60)
    events[2][1].set()
    for process in processes:
        process.join()
