"""What the repository ships of the demo: sizes, formats, and that training and held-out data stay apart."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from tokenizers import Tokenizer

from demo.claim_report import tables
from demo.datastore import (
    CAPTIONS_PER_SCENE,
    REFERENCES_PER_IMAGE,
    SHIPPED_IMAGES,
    SHIPPED_OTHER_IMAGES,
    datastore_rows,
)
from demo.world import (
    OTHER,
    OTHER_TEST,
    TEST,
    TRAINING,
    WEB,
    SceneSet,
    captions_of,
    load_kinds,
    named_kinds,
    sample_scene,
    scenes_of,
)

DEMO = Path(__file__).parents[2] / "demo"
LIMIT_BYTES = 20_000_000
SHIPPED = [
    pytest.param("", TEST, TRAINING, SHIPPED_IMAGES, id="training domains"),
    pytest.param("-held-out", OTHER_TEST, OTHER, SHIPPED_OTHER_IMAGES, id="held-out domains"),
]


def captions(suffix: str) -> list[tuple[str, str]]:
    with (DEMO / f"captions{suffix}.csv").open(encoding="utf-8", newline="") as file:
        return [(row["image"], row["caption"]) for row in csv.DictReader(file)]


def test_the_whole_demo_stays_small() -> None:
    files = [path for path in DEMO.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= LIMIT_BYTES
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pkl", ".ttf"}]


@pytest.mark.parametrize(("suffix", "pictures", "dumped", "count"), SHIPPED)
def test_pictures_are_of_test_scenes_and_dumps_of_others(
    suffix: str, pictures: SceneSet, dumped: SceneSet, count: int
) -> None:
    names = sorted(path.name for path in (DEMO / f"images{suffix}").glob("*.jpg"))
    assert names == [f"{seed}.jpg" for seed in pictures.seeds[:count]]
    rows = captions(suffix)
    assert rows == datastore_rows(dumped)
    assert len(rows) == CAPTIONS_PER_SCENE * len({image for image, _ in rows})


@pytest.mark.parametrize(("suffix", "pictures", "dumped", "count"), SHIPPED)
def test_each_picture_has_references_that_name_its_objects(
    suffix: str, pictures: SceneSet, dumped: SceneSet, count: int
) -> None:
    references = json.loads((DEMO / f"references{suffix}.json").read_text(encoding="utf-8"))
    files = {image["id"]: image["file_name"] for image in references["images"]}
    assert len(files) == count and all((DEMO / f"images{suffix}" / name).exists() for name in files.values())
    assert len(references["annotations"]) == count * REFERENCES_PER_IMAGE
    for annotation in references["annotations"]:
        scene = sample_scene(int(Path(files[annotation["image_id"]]).stem))
        assert named_kinds(annotation["caption"]) == scene.kinds


def test_pictures_are_small_jpegs() -> None:
    for path in DEMO.glob("images*/*.jpg"):
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
    for scene in scenes_of(WEB, 500):
        assert all(len(tokenizer.encode(caption).ids) <= 22 for caption in captions_of(scene, 2))
    for kind in load_kinds():
        assert [len(tokenizer.encode(f" {word}").ids) for word in (kind.noun, kind.plural)] == [1, 1]


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


def test_the_claims_are_of_a_thousand_scenes_and_stand_in_the_readme() -> None:
    claims = json.loads((DEMO / "claims.json").read_text(encoding="utf-8"))
    assert claims["scenes"] >= 1_000
    transfer = claims["transfer"]
    assert transfer["own_datastore"]["cider_low"] > transfer["training_datastore"]["cider_high"]
    assert transfer["own_datastore"]["cider_low"] > transfer["random"]["cider_high"]
    assert transfer["own_datastore"]["cider_low"] > transfer["none"]["cider_high"]
    assert tables(claims) in (DEMO / "README.md").read_text(encoding="utf-8")
    for plot in ("datastores", "k", "sizes"):
        assert (DEMO / f"claims-{plot}.png").stat().st_size > 5_000
