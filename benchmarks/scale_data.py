"""Makes what `benchmarks.scale` captions, small images that all differ, in S3 and in tars, and its tiny model.

An image's number is in its name, so that the rows of a run can be checked without a list of its ids.
"""

from __future__ import annotations

import asyncio
import io
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.measuring import environment
from benchmarks.tiny_models import ModelAndIndex, make_tiny_clip, make_tiny_smallcap
from smallcap.benchmark.random_content import random_captions

BUCKET = "images"
IMAGES_PER_TAR = 10_000
_SIZE_PX = 64
_SHAPES_PX = 8  # side of the random pixels that an image is enlarged from; more pixels make a larger file
_INDEX_CAPTIONS = 500
_UPLOADED_TOGETHER = 2_000
_NUMBER = re.compile(r"(\d{7})(\.jpg)?$")


def make_image(number: int) -> bytes:
    """Returns a JPEG file of about 1.5 KB; the same number gives the same file."""
    pixels = np.random.default_rng(number).integers(0, 256, (_SHAPES_PX, _SHAPES_PX, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((_SIZE_PX, _SIZE_PX), Image.Resampling.BILINEAR).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def image_name(number: int) -> str:
    """Returns an image's path below its prefix."""
    return f"{number // 1000:04d}/{number:07d}.jpg"


def image_number(image_id: str) -> int | None:
    """Returns the number of the image that an id names; None if it names something else."""
    match = _NUMBER.search(image_id)
    return int(match[1]) if match else None


def upload_images(prefix: str, images: int) -> None:
    """Puts the first images below a prefix of the bucket, except those that are already there."""
    from obstore.store import S3Store

    endpoint = os.environ["AWS_ENDPOINT_URL"]
    store = S3Store(BUCKET, prefix=prefix, endpoint=endpoint, client_options={"allow_http": True})
    there = {str(entry["path"]) for page in store.list() for entry in page}
    missing = [number for number in range(images) if image_name(number) not in there]

    async def put(numbers: Iterable[int]) -> None:
        await asyncio.gather(*(store.put_async(image_name(number), make_image(number)) for number in numbers))

    for start in range(0, len(missing), _UPLOADED_TOGETHER):
        asyncio.run(put(missing[start : start + _UPLOADED_TOGETHER]))


def write_tars(folder: Path, images: int) -> None:
    """Writes the first images into those WebDataset tars that do not exist; a tar appears when it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, images, IMAGES_PER_TAR):
        numbers = range(first, min(first + IMAGES_PER_TAR, images))
        target = folder / f"{first:07d}-{numbers.stop:07d}.tar"
        if target.exists():
            continue
        staged = target.with_suffix(".unfinished")
        with tarfile.open(staged, "w") as tar:
            for number in numbers:
                data = make_image(number)
                member = tarfile.TarInfo(f"{number:07d}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        staged.replace(target)


def make_tiny_model(folder: Path) -> ModelAndIndex:
    """Writes the model and builds its index with `smallcap build-index`, unless they exist."""
    made = ModelAndIndex(str(folder / "smallcap"), str(folder / "index"))
    if (folder / "done").exists():
        return made
    clip = folder / "clip"
    clip.mkdir(parents=True, exist_ok=True)
    make_tiny_smallcap(Path(made.model), make_tiny_clip(clip, seed=0))
    dump = folder / "captions.csv"
    dump.write_text("\n".join(["caption", *random_captions(_INDEX_CAPTIONS)]) + "\n")
    command = [sys.executable, "-m", "jobs.cli", "build-index", str(dump), "--out", made.index]
    subprocess.run([*command, "--encoder", f"hf:{clip}"], env=environment(), stdout=sys.stderr, check=True)
    (folder / "done").touch()
    return made
