"""`smallcap bench` goes through the job's tables; `--host` measures what is left when a GPU answers at once."""

import json

import pytest

from jobs import bench
from smallcap.config import BenchmarkOptions


@pytest.mark.slow
def test_the_whole_loop_is_the_jobs() -> None:
    result = bench.run(BenchmarkOptions(device="cpu", images=4, batch_size=2, captions=200, repeats=1))
    assert result.images_per_s > 0


def test_the_hosts_part_is_the_sum_of_its_parts() -> None:
    values = json.loads(bench.run_host(BenchmarkOptions(captions=12_000, repeats=1)).to_json())
    assert sum(values["parts"].values()) == pytest.approx(values["us_per_image"])
    assert values["parts"].keys() == {
        "copy crops", "search", "prompts", "detokenise", "tokenise for clip score", "Arrow tables, and the rest",
    }  # fmt: skip
    assert all(us > 0 for us in values["parts"].values())
    assert values["images_per_s"] == pytest.approx(1e6 / values["us_per_image"])
