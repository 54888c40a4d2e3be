"""The jobs' actors on the pretended device: Arrow in, Arrow out, and the rows and features that a CPU gives."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import caption
from jobs.cluster.display import Activity
from jobs.train import open_record
from jobs.training.features import VisionSide, store_features
from jobs.training.inputs import list_inputs
from smallcap.model.encoder_spec import load_crop_plan
from smallcap.output.part_files import list_parts
from smallcap.training.feature_store import FeatureRows, QueryRows, read_features, read_queries
from tests.caption_runs import config_for, write_images
from tests.in_process_ray import NODE, in_process_ray
from tests.index_files import build_text_index
from tests.pretended_cuda.conftest import TEXTS
from tests.pretended_cuda.torch_cuda import pretended_cuda
from tests.train_runs import train_config, write_captioned_images


@pytest.fixture(scope="module")
def index(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_index(tmp_path_factory.mktemp("index"), tiny_clip)


def build_index(folder: Path, clip: Path) -> str:
    return build_text_index(folder, clip, [f"{number:03d}.jpg,{text}" for number, text in enumerate(TEXTS)])


@pytest.fixture
def gpu_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the node of the cluster a GPU."""
    monkeypatch.setitem(NODE["Resources"], "GPU", 1.0)


SETTINGS = [
    ("compute.batch_size=2", "output.save_embeddings=true", "retrieval.exclude_own_captions=true"),
    ("compute.batch_size=auto", "generation.num_captions=2", "generation.num_beams=4"),
]


def rows_on(device: str, index: str, model: Path, folder: Path, *sets: str) -> list[dict[str, Any]]:
    """Captions nine images, of which one is none, with the job; returns its rows."""
    write_images(f"{folder}/images", 9)
    (folder / "images" / "004.jpg").write_bytes(b"no image")
    given = (*sets, f"compute.device={device}", "output.rows_per_part=4", f"retrieval.cache_dir={folder}/cache")
    config = config_for(f"{folder}/images", index, model, f"{folder}/{device}", *given)
    with in_process_ray():
        caption.run(config)
    tables = [pq.read_table(part) for part in list_parts(config.out)]
    return pa.concat_tables(tables).sort_by("image_id").to_pylist()


@pytest.mark.usefixtures("gpu_node")
@pytest.mark.parametrize("sets", SETTINGS)
def test_rows_are_the_cpus(index: str, tiny_smallcap: Path, tmp_path: Path, sets: tuple[str, ...]) -> None:
    expected = rows_on("cpu", index, tiny_smallcap, tmp_path, *sets)
    with pretended_cuda() as cuda:
        found = rows_on("cuda", index, tiny_smallcap, tmp_path, *sets)
        assert cuda.captures
    assert [row["status"] for row in found] == ["ok"] * 4 + ["error"] + ["ok"] * 4
    check_rows(found, expected)


def check_rows(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert without_floats(found) == without_floats(expected)
    assert floats_of(found) == pytest.approx(floats_of(expected), abs=1e-3)


def without_floats(value: Any) -> Any:
    """Returns a value of rows, lists and leaves without its floats."""
    if isinstance(value, dict):
        return {name: without_floats(item) for name, item in value.items() if not isinstance(item, float)}
    return [without_floats(item) for item in value] if isinstance(value, list) else value


def floats_of(value: Any) -> list[float]:
    """Returns the floats in a value of rows, lists and leaves."""
    if isinstance(value, (dict, list)):
        return [number for item in (value.values() if isinstance(value, dict) else value) for number in floats_of(item)]
    return [value] if isinstance(value, float) else []


@pytest.mark.usefixtures("gpu_node")
def test_features_for_training_are_the_cpus(index: str, tiny_smallcap: Path, tmp_path: Path) -> None:
    source = write_captioned_images(tmp_path / "captioned", 7)
    (source.parent / "003.jpg").write_bytes(b"no image")

    def features_on(device: str) -> tuple[FeatureRows, QueryRows]:
        config = train_config(source, index, tiny_smallcap, tmp_path / device, f"compute.device={device}")
        _, start = open_record(config)
        plan = load_crop_plan(str(tiny_smallcap), start.retrieval_encoder)
        folder = f"{tmp_path}/{device}/features"
        with in_process_ray():
            inputs, vision = list_inputs(config, config.out), VisionSide(plan, "0" * 64)
            manifest = store_features(config, start, inputs, vision, folder, Activity("Encoding images"))
        (part,) = manifest.parts
        uri = f"{folder}/{part.split}/{part.name}"
        return read_features(uri), read_queries(uri)

    expected, expected_queries = features_on("cpu")
    with pretended_cuda() as cuda:
        found, queries = features_on("cuda")
        assert cuda.threads
    assert found.image_ids == expected.image_ids
    assert len(found.image_ids) == 6
    assert np.allclose(found.features, expected.features, rtol=1e-2, atol=1e-3)
    assert queries.embeddings is not None
    assert queries.embeddings == pytest.approx(expected_queries.embeddings, abs=1e-5)
