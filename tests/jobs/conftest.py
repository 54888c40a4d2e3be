from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest
import typer.main
import typer.testing

from jobs import caption
from smallcap.config import CaptionConfig
from tests.caption_runs import config_for, write_images
from tests.in_process_ray import in_process_ray
from tests.index_files import build_text_index


@pytest.fixture(autouse=True)
def no_ray_where_it_is_not_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    """The jobs of tests that are not marked `ray` meet what answers in Ray's place in this process."""
    with nullcontext() if request.node.get_closest_marker("ray") else in_process_ray():
        yield


@pytest.fixture(scope="session", autouse=True)
def one_command_line() -> Iterator[None]:
    """Typer makes all commands and their options anew for each call, which takes longer than most calls here."""
    made = cache(typer.main.get_command)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(typer.main, "get_command", made)
        monkeypatch.setattr(typer.testing, "_get_command", made)
        yield


@pytest.fixture(scope="session")
def index(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("index")
    rows = [
        f"{n}.jpg,{n} {noun} on the {place}" for n in range(4) for noun in ("dog", "bus") for place in ("road", "sea")
    ]
    return build_text_index(folder, tiny_clip, rows)


@pytest.fixture(scope="session")
def finished_run(index: str, tiny_smallcap: Path, tmp_path_factory: pytest.TempPathFactory) -> CaptionConfig:
    """The config of a run over nine images, in parts of four, that is complete; a copy of its output is its equal."""
    folder = tmp_path_factory.mktemp("finished-run")
    write_images(f"{folder}/images", 9)
    sets = ("output.rows_per_part=4", "compute.batch_size=4")
    config = config_for(f"{folder}/images", index, tiny_smallcap, f"{folder}/out", *sets)
    with in_process_ray():
        caption.run(config)
    return config
