"""What the repository ships of the demo: sizes, formats, and that training and held-out data stay apart."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from tokenizers import Tokenizer

from demo.datastore import CAPTIONS_PER_SCENE, REFERENCES_PER_IMAGE, SHIPPED_IMAGES
from demo.world import HELD_OUT_SEEDS, TRAIN_SEEDS, captions_of, named_kinds, sample_scene

DEMO = Path(__file__).parents[2] / "demo"
LIMIT_BYTES = 15 * 2**20


def captions() -> list[dict[str, str]]:
    with (DEMO / "captions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_whole_demo_stays_small() -> None:
    files = [path for path in DEMO.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= LIMIT_BYTES
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pkl", ".ttf"}]


def test_the_shipped_pictures_are_held_out_and_the_dump_is_of_training_scenes() -> None:
    images = sorted((DEMO / "images").glob("*.jpg"))
    assert len(images) == SHIPPED_IMAGES
    assert all(int(path.stem) in HELD_OUT_SEEDS for path in images)
    rows = captions()
    seeds = [int(row["image"].removeprefix("train-").removesuffix(".jpg")) for row in rows]
    assert all(seed in TRAIN_SEEDS for seed in seeds)
    assert not {path.name for path in images} & {row["image"] for row in rows}
    assert all(seeds.count(seed) >= CAPTIONS_PER_SCENE for seed in seeds[:50])


def test_the_dump_names_the_objects_of_its_scenes() -> None:
    for row in captions()[:500]:
        seed = int(row["image"].removeprefix("train-").removesuffix(".jpg"))
        assert named_kinds(row["caption"]) == sample_scene(seed).kinds


def test_each_picture_has_references_that_name_its_objects() -> None:
    references = json.loads((DEMO / "references.json").read_text(encoding="utf-8"))
    files = {image["id"]: image["file_name"] for image in references["images"]}
    assert len(files) == SHIPPED_IMAGES and all((DEMO / "images" / name).exists() for name in files.values())
    assert len(references["annotations"]) == SHIPPED_IMAGES * REFERENCES_PER_IMAGE
    for annotation in references["annotations"]:
        scene = sample_scene(int(Path(files[annotation["image_id"]]).stem))
        assert named_kinds(annotation["caption"]) == scene.kinds


def test_pictures_are_small_jpegs() -> None:
    for path in (DEMO / "images").glob("*.jpg"):
        with Image.open(path) as image:
            assert (image.format, image.size) == ("JPEG", (192, 192))


def test_the_tokenizer_keeps_gpt2s_conventions() -> None:
    tokenizer = Tokenizer.from_file(str(DEMO / "model" / "smallcap" / "tokenizer.json"))
    assert tokenizer.token_to_id("!") == 0
    assert tokenizer.encode(".").ids == [13]
    prompt = "Similar images show\n\na dog on red\n\nan owl.\n\nThis image shows "
    ids = tokenizer.encode(prompt).ids
    assert tokenizer.decode(ids) == prompt
    assert tokenizer.encode("\n\n").ids == tokenizer.encode("\n").ids * 2
    assert ids[-1] == tokenizer.encode(" ").ids[0]
    for seed in range(500):
        assert all(len(tokenizer.encode(caption).ids) <= 22 for caption in captions_of(sample_scene(seed), 2))


def test_the_clip_tokenizer_ends_each_text_where_the_text_tower_looks() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO / "model" / "clip")
    text_config = json.loads((DEMO / "model" / "clip" / "config.json").read_text(encoding="utf-8"))["text_config"]
    batch = tokenizer(["a dog", "a dog above a cat on a red ground"], padding=True)
    assert text_config["eos_token_id"] == tokenizer.eos_token_id != 2
    for ids in batch["input_ids"]:
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.eos_token_id) == 1
    assert batch["input_ids"][0][-1] == tokenizer.pad_token_id == text_config["pad_token_id"]


def test_the_checkpoint_has_the_references_layout() -> None:
    folder = DEMO / "model" / "smallcap"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "smallcap"
    assert config["decoder"]["model_type"] == "this_gpt2"
    assert config["encoder"]["model_type"] == "clip"
    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    layer = "decoder.transformer.h.0"
    assert {"encoder.post_layernorm.weight", "decoder.transformer.wte.weight"} <= names
    assert {f"{layer}.crossattention.{part}.weight" for part in ("c_attn", "q_attn", "c_proj")} <= names
