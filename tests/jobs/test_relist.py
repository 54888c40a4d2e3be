"""A relist of folders whose images were overwritten, added and deleted since, on a disk and in a bucket."""

import io
import shutil
from pathlib import Path

import pytest
from PIL import Image

from jobs import caption
from jobs.captioning.record import load_run_record
from smallcap import storage
from smallcap.config import CaptionConfig
from smallcap.output.part_files import read_part_infos
from tests.caption_runs import Killed, config_for, jpeg, killed_at, read_rows, write_images

SETS = ("output.rows_per_part=3", "compute.batch_size=3", "output.save_embeddings=true")


def png(width: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, 20), (width, 90, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def change(images: str) -> None:
    """Overwrites two images, deletes one, and adds one."""
    storage.write_bytes(f"{images}/001.jpg", png(33))
    storage.write_bytes(f"{images}/005.jpg", png(44))
    storage.remove(f"{images}/002.jpg")
    storage.write_bytes(f"{images}/new.jpg", jpeg(77))


def check_rows(config: CaptionConfig) -> None:
    rows = read_rows(config.out)
    widths = dict(zip(rows.image_id, rows.width, strict=True))
    assert widths == {f"{n:03d}.jpg": {1: 33, 5: 44}.get(n, 80) for n in range(8)} | {"new.jpg": 80}
    infos = [info for _, info in read_part_infos(config.out)]
    assert sum(len(ranges) for info in infos for ranges in info.rows.values()) == 9
    record = load_run_record(config.out)
    assert record is not None
    assert (record.status, record.images.ok) == ("complete", 9)


def test_overwritten_images_are_captioned_again(anywhere: str, index: str, tiny_smallcap: Path) -> None:
    images = f"{anywhere}/images"
    write_images(images, 8)
    config = config_for(images, index, tiny_smallcap, f"{anywhere}/out", *SETS)
    caption.run(config)
    before = read_rows(config.out)
    untouched = caption.run(config, relist=True)
    assert untouched.new_images == 0
    change(images)
    summary = caption.run(config, relist=True)
    assert summary.new_images == 3
    assert "2 images overwritten since, captioned again; 1 image gone" in caption.describe(summary)
    check_rows(config)
    same = [f"{n:03d}.jpg" for n in (0, 2, 3, 4, 6, 7)]
    assert list(read_rows(config.out).loc[same].caption) == list(before.loc[same].caption)
    assert caption.run(config, relist=True).new_images == 0
    storage.write_bytes(f"{images}/new.jpg", png(55))  # what a relist has added can be overwritten as well
    assert caption.run(config, relist=True).new_images == 1
    assert read_rows(config.out).width["new.jpg"] == 55


def test_a_relist_that_is_killed_goes_on(
    tmp_path: Path, index: str, tiny_smallcap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = str(tmp_path / "images")
    write_images(images, 8)
    config = config_for(images, index, tiny_smallcap, str(tmp_path / "out"), *SETS)
    caption.run(config)
    change(images)
    begun = tmp_path / "begun"
    shutil.copytree(config.out, begun)
    with killed_at(1000, monkeypatch) as changes:
        caption.run(config, relist=True)
    for step in range(len(changes)):
        shutil.rmtree(config.out)
        shutil.copytree(begun, config.out)
        with killed_at(step, monkeypatch), pytest.raises(Killed):
            caption.run(config, relist=True)
        caption.run(config, relist=True)
        check_rows(config)


def test_lists_name_images_without_a_state(tmp_path: Path, index: str, tiny_smallcap: Path) -> None:
    images = str(tmp_path / "images")
    write_images(images, 3)
    names = tmp_path / "list.txt"
    names.write_text("\n".join(f"{images}/{n:03d}.jpg" for n in range(3)))
    config = config_for(str(names), index, tiny_smallcap, str(tmp_path / "out"), *SETS)
    caption.run(config)
    storage.write_bytes(f"{images}/001.jpg", png(33))
    names.write_text("\n".join(f"{images}/{n:03d}.jpg" for n in range(2)))
    summary = caption.run(config, relist=True)
    assert summary.new_images == 0
    assert summary.relisted is not None
    assert (len(summary.relisted.overwritten), summary.relisted.gone) == (0, 1)
