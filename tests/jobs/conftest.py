from pathlib import Path

import pytest

from index_builder.build import build_index
from smallcap.config import IndexConfig


@pytest.fixture(scope="session")
def index(ray_session: None, tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("index")
    rows = [
        f"{n}.jpg,{n} {noun} on the {place}" for n in range(4) for noun in ("dog", "bus") for place in ("road", "sea")
    ]
    (folder / "dump.csv").write_text("\n".join(["image,caption", *rows]))
    dumps = (str(folder / "dump.csv"),)
    build_index(IndexConfig(dumps=dumps, out=str(folder / "index"), encoder=f"hf:{tiny_clip}", shards=2))
    return str(folder / "index")


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place of either kind."""
    return str(tmp_path) if request.param == "local" else str(request.getfixturevalue("s3"))
