"""Writes what the demo ships besides its model: caption dumps, test images and their reference captions."""

import csv
import json
import shutil
from pathlib import Path

from demo.render import encode_jpeg
from demo.world import OTHER, OTHER_TEST, TEST, TRAINING, SceneSet, captions_of, sample_scene, scenes_of

DATASTORE_SCENES = 15_000
CAPTIONS_PER_SCENE = 2
REFERENCES_PER_IMAGE = 5
SHIPPED_IMAGES = 48  # of the training domains
SHIPPED_OTHER_IMAGES = 24
FIRST_MEASURED = 1_000  # test scenes from this one on are measured and never shipped


def image_name(scenes: SceneSet, seed: int) -> str:
    """Returns the name of a scene's image in a dump; the image itself is not shipped."""
    return f"{scenes.name}-{seed}.jpg"


def datastore_rows(scenes: SceneSet = TRAINING, count: int = DATASTORE_SCENES) -> list[tuple[str, str]]:
    """Returns the (image, caption) rows of a dump: captions of the first `count` scenes of a set."""
    return [
        (image_name(scenes, scene.seed), caption)
        for scene in scenes_of(scenes, count)
        for caption in captions_of(scene, CAPTIONS_PER_SCENE, salt="datastore")
    ]


def write_captions(rows: list[tuple[str, str]], path: Path) -> None:
    """Writes a dump as CSV with the columns image and caption."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "caption"])
        writer.writerows(rows)


def write_images(scenes: SceneSet, count: int, folder: Path) -> None:
    """Writes the images of the first scenes of a set; a file is named by its scene's seed."""
    folder.mkdir(parents=True, exist_ok=True)
    for scene in scenes_of(scenes, count):
        (folder / f"{scene.seed}.jpg").write_bytes(encode_jpeg(scene))


def write_references(scenes: SceneSet, count: int, path: Path) -> None:
    """Writes the captions of these images in COCO's format; the image id is the scene's seed."""
    seeds = scenes.seeds[:count]
    captions = [(seed, caption) for seed in seeds for caption in captions_of(sample_scene(seed), REFERENCES_PER_IMAGE)]
    references = {
        "info": {"description": "Captions of the demo's test scenes"},
        "images": [{"id": seed, "file_name": f"{seed}.jpg"} for seed in seeds],
        "annotations": [
            {"id": number, "image_id": seed, "caption": caption}
            for number, (seed, caption) in enumerate(captions, start=1)
        ],
    }
    path.write_text(json.dumps(references, indent=1) + "\n", encoding="utf-8")


def write_shipped(folder: Path) -> None:
    """Writes dumps, images and references of the training domains and of the held-out ones."""
    write_captions(datastore_rows(TRAINING), folder / "captions.csv")
    write_captions(datastore_rows(OTHER), folder / "captions-held-out.csv")
    for images in ("images", "images-held-out"):
        shutil.rmtree(folder / images, ignore_errors=True)
    write_images(TEST, SHIPPED_IMAGES, folder / "images")
    write_images(OTHER_TEST, SHIPPED_OTHER_IMAGES, folder / "images-held-out")
    write_references(TEST, SHIPPED_IMAGES, folder / "references.json")
    write_references(OTHER_TEST, SHIPPED_OTHER_IMAGES, folder / "references-held-out.json")
