"""What the demo ships beside its model: the caption dump, the held-out pictures and their reference captions."""

import csv
import json
from pathlib import Path

from demo.render import encode_jpeg
from demo.world import HELD_OUT_SEEDS, TRAIN_SEEDS, captions_of, sample_scene

DATASTORE_SCENES = 3_000
CAPTIONS_PER_SCENE = 2
SHIPPED_IMAGES = 48
REFERENCES_PER_IMAGE = 5


def datastore_rows() -> list[tuple[str, str]]:
    """Returns (image, caption) of the dump: captions of the first training scenes."""
    return [
        (f"train-{seed:06d}.jpg", caption)
        for seed in TRAIN_SEEDS[:DATASTORE_SCENES]
        for caption in captions_of(sample_scene(seed), CAPTIONS_PER_SCENE, salt="datastore")
    ]


def write_captions(path: Path) -> None:
    """Writes the dump as CSV with the columns image and caption."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "caption"])
        writer.writerows(datastore_rows())


def write_images(folder: Path) -> None:
    """Writes the held-out pictures that the demo captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in HELD_OUT_SEEDS[:SHIPPED_IMAGES]:
        (folder / f"{seed}.jpg").write_bytes(encode_jpeg(sample_scene(seed)))


def write_references(path: Path) -> None:
    """Writes the pictures' captions in COCO's format; the image id is the scene's seed."""
    seeds = HELD_OUT_SEEDS[:SHIPPED_IMAGES]
    captions = [(seed, caption) for seed in seeds for caption in captions_of(sample_scene(seed), REFERENCES_PER_IMAGE)]
    references = {
        "info": {"description": "Captions of the demo's held-out scenes"},
        "images": [{"id": seed, "file_name": f"{seed}.jpg"} for seed in seeds],
        "annotations": [
            {"id": number, "image_id": seed, "caption": caption}
            for number, (seed, caption) in enumerate(captions, start=1)
        ],
    }
    path.write_text(json.dumps(references, indent=1) + "\n", encoding="utf-8")
