"""Which images a build calibrates with; how they are listed is tested with their sources."""

from pathlib import Path

import pytest

from index_builder.embedding.image_queries import plan_image_queries
from smallcap.errors import ConfigError, StorageError


def test_images_are_taken_evenly_in_the_order_of_their_ids_and_each_once(tmp_path: Path) -> None:
    rows = [f"{number:03d},https://host/{number:03d}.jpg" for number in range(199, -1, -1)]
    (tmp_path / "list.csv").write_text("\n".join(["image_id,image_uri", *rows, "000,https://host/again.jpg"]))
    items = plan_image_queries([f"{tmp_path}/list.csv", f"{tmp_path}/list.csv"], 100)
    assert [len(item) for item in items] == [64, 36]
    taken = [int(uri[-7:-4]) for item in items for uri in item]  # of two images with one id the first in order
    assert taken == sorted(set(taken))
    assert (len(taken), taken[-1]) == (100, 199)


def test_sources_that_cannot_be_calibrated_with(tmp_path: Path) -> None:
    for name in ("empty", "packed", "few"):
        (tmp_path / name).mkdir()
    (tmp_path / "packed" / "00000.tar").write_bytes(b"")
    (tmp_path / "few" / "a.jpg").write_bytes(b"x")
    for name, message in (("empty", "There are no images"), ("packed", "tars"), ("few", "too few calibration images")):
        with pytest.raises(ConfigError, match=message):
            plan_image_queries([f"{tmp_path}/{name}"], 100)
    with pytest.raises(StorageError, match="does not exist"):
        plan_image_queries([f"{tmp_path}/nothing"], 100)
