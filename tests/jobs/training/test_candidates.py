"""What is retrieved for training images: the nearest captions but their own, as deep as the mode needs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from jobs.training.candidates import CandidateSpec, FindCandidates, count_leaks
from smallcap.index.manifest import IndexManifest
from smallcap.training.feature_store import (
    StoreManifest,
    feature_table,
    list_parts,
    part_name,
    read_candidates,
    write_part,
)
from tests.index_files import unit_vectors

IMAGES = 6
NAME = part_name(0, 0, is_last=True)


def write_features(folder: Path, embeddings: np.ndarray, image_ids: list[str]) -> StoreManifest:
    nothing = pa.nulls(IMAGES, pa.string())
    columns = {"image_id": image_ids, "image_uri": image_ids, "status": ["ok"] * IMAGES}
    rows = pa.table(columns | {"error_code": nothing, "error_message": nothing})
    captions = [[f"caption {2 * image}", f"caption {2 * image + 1}"] for image in range(IMAGES)]
    features = np.zeros((IMAGES, 5, 8), np.float16)
    write_part(str(folder / "features" / "train" / NAME), feature_table(rows, captions, features, embeddings))
    return StoreManifest(identity={}, complete=True, parts=list_parts(str(folder / "features")))


def find(folder: Path, features: StoreManifest, index_id: str, depth: int) -> list[list[str]]:
    folders = str(folder / "features"), str(folder / "candidates")
    spec = CandidateSpec(str(folder / "index"), index_id, str(folder / "cache"), depth, "cpu", *folders)
    for part in features.parts:
        assert FindCandidates(spec)(part) == IMAGES
    return read_candidates(str(folder / "candidates" / "train" / NAME))


def two_captions_each(
    folder: Path, publish_index: Callable, owner: str
) -> tuple[np.ndarray, IndexManifest, StoreManifest]:
    """Images whose two captions are the nearest of all to them: their vectors, an index, and stored features."""
    images = unit_vectors(IMAGES, 16)
    texts = [f"caption {number}" for number in range(2 * IMAGES)]
    owners = [[owner.format(number // 2)] for number in range(2 * IMAGES)]
    manifest = publish_index(str(folder / "index"), np.repeat(images, 2, axis=0), texts, owners)
    return images, manifest, write_features(folder, images, [f"{image}.jpg" for image in range(IMAGES)])


def test_own_captions_are_left_out(tmp_path: Path, publish_index: Callable) -> None:
    images, manifest, features = two_captions_each(tmp_path, publish_index, "{}.jpg")
    folders = str(tmp_path / "features"), str(tmp_path / "candidates")

    found = find(tmp_path, features, manifest.index_id, depth=2)
    scores = images @ images.T
    for image, captions in enumerate(found):
        others = [other for other in np.argsort(-scores[image]) if other != image]
        assert captions == [f"caption {2 * others[0]}", f"caption {2 * others[0] + 1}"]
    assert count_leaks(features, folders) == 0

    deep = find(tmp_path, features, manifest.index_id, depth=50)
    assert all(len(captions) == 2 * (IMAGES - 1) for captions in deep)


def test_ids_that_do_not_match_are_noticed(tmp_path: Path, publish_index: Callable) -> None:
    _, manifest, features = two_captions_each(tmp_path, publish_index, "images/{}.jpg")
    find(tmp_path, features, manifest.index_id, depth=2)
    assert count_leaks(features, (str(tmp_path / "features"), str(tmp_path / "candidates"))) == IMAGES
