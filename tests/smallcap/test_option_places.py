"""Places that options name are the same from any folder."""

from pathlib import Path

import pytest

from smallcap.config import CaptionConfig
from smallcap.option_places import absolute_place, absolute_places
from smallcap.options import list_options
from smallcap.training.config import TrainConfig


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with models."""
    for name in ("models/clip", "gpt2-mine"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "models" / "weights.pt").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "typed", "expected"),
    [
        ("uri", "photos", "{folder}/photos"),
        ("uri", "./photos/", "{folder}/photos"),
        ("uri", "photos/*.jpg", "{folder}/photos/*.jpg"),
        ("uri", "file:///photos", "/photos"),
        ("uri", "~/photos", "{home}/photos"),
        ("uri", "s3://bucket/photos/", "s3://bucket/photos"),
        ("uri", "https://host/list.txt", "https://host/list.txt"),
        ("model", "models/clip", "{folder}/models/clip"),
        ("model", "gpt2-mine", "{folder}/gpt2-mine"),
        ("model", "demo", "demo"),
        ("model", "Yova/SmallCap7M", "Yova/SmallCap7M"),
        ("model", "s3://bucket/run/model/", "s3://bucket/run/model"),
        ("encoder", "hf:s3://bucket/clip/", "hf:s3://bucket/clip"),
        ("encoder", "open_clip:RN50/s3://bucket/weights.pt", "open_clip:RN50/s3://bucket/weights.pt"),
        ("encoder", "demo", "demo"),
        ("encoder", "hf:models/clip", "hf:{folder}/models/clip"),
        ("encoder", "hf:openai/clip-vit-base-patch32", "hf:openai/clip-vit-base-patch32"),
        ("encoder", "open_clip:RN50x64/openai", "open_clip:RN50x64/openai"),
        ("encoder", "open_clip:RN50/models/weights.pt", "open_clip:RN50/{folder}/models/weights.pt"),
        ("encoder", "open_clip:local-dir:models/clip", "open_clip:local-dir:{folder}/models/clip"),
    ],
)
def test_a_path_is_absolute_and_a_name_stays(kind: str, typed: str, expected: str, folder: Path) -> None:
    whole = expected.format(folder=folder, home=Path.home())
    assert absolute_place(typed, kind) == whole  # type: ignore[arg-type]
    assert absolute_place(whole, kind) == whole  # type: ignore[arg-type]


def test_paths_start_from_the_folder_that_is_given(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    values = {"images": ["a", "/b"], "out": "out", "index": None, "retrieval": {"encoder": "hf:clip", "k": 4}}
    given = absolute_places(CaptionConfig, values, str(folder / "models"))
    assert given == {
        "images": [f"{folder}/models/a", "/b"],
        "out": f"{folder}/models/out",
        "index": None,
        "retrieval": {"encoder": f"hf:{folder}/models/clip", "k": 4},
    }
    assert values["images"] == ["a", "/b"]


def test_every_place_of_a_recorded_config_is_one() -> None:
    places = {
        kind: {option.key for option in list_options(kind) if option.place} for kind in (CaptionConfig, TrainConfig)
    }
    assert places[CaptionConfig] == {"images", "index", "model", "out", "retrieval.encoder"}
    assert places[TrainConfig] == {
        *("sources", "validation", "images", "index", "out", "model", "vision_encoder", "decoder"),
        *("retrieval_encoder", "features"),
    }
