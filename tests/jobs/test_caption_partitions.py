"""The captioning job over an index that actors share: the rows are those of a run that maps the whole index."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs import caption
from smallcap import storage
from smallcap.config import CaptionConfig
from smallcap.errors import ConfigError
from smallcap.index.manifest import IndexManifest
from smallcap.model.clip_encoder import load_retrieval_encoder
from smallcap.options import load_config
from smallcap.output.part_files import list_parts

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


@pytest.fixture
def index(tmp_path: Path, tiny_clip: Path, publish_index: Callable[..., IndexManifest]) -> str:
    texts = [f"{n} {noun} on the {place}" for n in range(9) for noun in ("dog", "bus") for place in ("road", "sea")]
    encoder = load_retrieval_encoder(f"hf:{tiny_clip}")
    settings = {"index_key": "IVF4,SQ8", "nprobe": 2, "k_factor": 2, "removed": [3, 20], "encoder": encoder.identity}
    publish_index(f"{tmp_path}/index", encoder.encode_texts(texts), texts, shards=4, **settings)
    return f"{tmp_path}/index"


def run(images: str, index: str, model: Path, out: str, *sets: str) -> pd.DataFrame:
    flags = {"images": [images], "index": index, "model": str(model), "out": out}
    sets = ("compute.batch_size=4", "compute.dtype=float32", *sets)
    caption.run(load_config(CaptionConfig, flags=flags, sets=sets))
    tables = [pq.read_table(io.BytesIO(storage.read_bytes(part))).to_pandas() for part in list_parts(out)]
    return pd.concat(tables).set_index("image_id").sort_index()


def test_partitions_change_no_row(tmp_path: Path, index: str, tiny_smallcap: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(10):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    cache = f"retrieval.cache_dir={tmp_path}/cache"
    expected, found = (
        run(
            f"{tmp_path}/images",
            index,
            tiny_smallcap,
            f"{tmp_path}/out-{count}",
            cache,
            f"retrieval.partitions={count}",
        )
        for count in (1, 2)
    )
    assert set(found.status) == {"ok"}
    assert found.caption.tolist() == expected.caption.tolist()
    for row in found.index:
        assert [dict(n) for n in found.neighbours[row]] == [dict(n) for n in expected.neighbours[row]]
        assert len(found.neighbours[row]) == 4


def test_more_partitions_than_shards_stop_the_run_at_once(tmp_path: Path, index: str, tiny_smallcap: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 50)).save(tmp_path / "images" / "0.png")
    with pytest.raises(ConfigError, match="fewer shards"):
        run(f"{tmp_path}/images", index, tiny_smallcap, f"{tmp_path}/out", "retrieval.partitions=9")
    with pytest.raises(ConfigError, match="searched on CPUs"):
        sets = ("retrieval.partitions=2", "retrieval.search_device=cuda")
        run(f"{tmp_path}/images", index, tiny_smallcap, f"{tmp_path}/out", *sets)
