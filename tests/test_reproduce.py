"""The configs that reproduce the paper parse, and each data set's three fit together."""

from pathlib import Path

import pytest

from smallcap.config import CaptionConfig, EvaluateConfig, IndexConfig
from smallcap.options import load_config

FOLDER = Path(__file__).parents[1] / "docs" / "reproduce"
DATA_SETS = ["coco", "flickr30k", "msrvtt", "nocaps", "vizwiz"]


def test_every_folder_is_known() -> None:
    assert sorted(path.name for path in FOLDER.iterdir()) == DATA_SETS


@pytest.mark.parametrize("name", DATA_SETS)
def test_the_configs_of_a_data_set_fit_together(name: str) -> None:
    files = {path.name for path in (FOLDER / name).iterdir()}
    assert files == {"index.yaml", "caption.yaml", "evaluate.yaml"}
    index = load_config(IndexConfig, str(FOLDER / name / "index.yaml"))
    caption = load_config(CaptionConfig, str(FOLDER / name / "caption.yaml"))
    evaluate = load_config(EvaluateConfig, str(FOLDER / name / "evaluate.yaml"))
    assert caption.index == (evaluate.index,) == (index.out,)
    assert evaluate.runs == (caption.out,)
    assert (index.encoder, caption.retrieval.k) == ("open_clip:RN50x64/openai", 4)


def test_the_page_names_every_config_folder() -> None:
    page = (FOLDER.parent / "reproduce.md").read_text()
    assert all(f"`{name}`" in page for name in DATA_SETS)
