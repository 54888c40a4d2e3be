"""The captioning job over an index that actors share: the rows are those of a run that maps the whole index."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import caption
from smallcap.errors import ConfigError
from smallcap.index.manifest import IndexManifest
from smallcap.model.clip_encoder import load_retrieval_encoder
from tests.caption_runs import config_for, read_rows, write_images


@pytest.fixture
def index(tmp_path: Path, tiny_clip: Path, publish_index: Callable[..., IndexManifest]) -> str:
    texts = [f"{n} {noun} on the {place}" for n in range(9) for noun in ("dog", "bus") for place in ("road", "sea")]
    encoder = load_retrieval_encoder(f"hf:{tiny_clip}")
    settings = {"index_key": "IVF4,SQ8", "nprobe": 2, "k_factor": 2, "removed": [3, 20], "encoder": encoder.identity}
    publish_index(f"{tmp_path}/index", encoder.encode_texts(texts), texts, shards=4, **settings)
    return f"{tmp_path}/index"


def test_partitions_change_no_row(tmp_path: Path, index: str, tiny_smallcap: Path) -> None:
    write_images(f"{tmp_path}/images", 10)
    runs = []
    for count in (1, 2):
        out = f"{tmp_path}/out-{count}"
        sets = (f"retrieval.cache_dir={tmp_path}/cache", f"retrieval.partitions={count}", "compute.batch_size=4")
        caption.run(config_for(f"{tmp_path}/images", index, tiny_smallcap, out, *sets))
        runs.append(read_rows(out))
    expected, found = runs
    assert set(found.status) == {"ok"}
    assert found.caption.tolist() == expected.caption.tolist()
    for row in found.index:
        assert [dict(n) for n in found.neighbours[row]] == [dict(n) for n in expected.neighbours[row]]
        assert len(found.neighbours[row]) == 4


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["retrieval.partitions=9"], "fewer shards"),
        (["retrieval.partitions=2", "retrieval.search_device=cuda"], "searched on CPUs"),
    ],
)
def test_partitions_that_cannot_be_stop_the_run_at_once(
    tmp_path: Path, index: str, tiny_smallcap: Path, sets: list[str], message: str
) -> None:
    write_images(f"{tmp_path}/images", 1)
    with pytest.raises(ConfigError, match=message):
        caption.run(config_for(f"{tmp_path}/images", index, tiny_smallcap, f"{tmp_path}/out", *sets))
