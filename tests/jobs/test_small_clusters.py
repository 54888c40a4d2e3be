"""A cluster of one CPU, in a process of its own: an actor and the tasks that feed it have to share the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.caption_runs import config_for, read_rows, write_images

SCRIPT = """
import sys
import ray
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
from jobs import caption
from smallcap.config import CaptionConfig
caption.run(CaptionConfig.model_validate_json(sys.argv[1]))
"""


@pytest.mark.own_ray
@pytest.mark.slow
@pytest.mark.parametrize("sets", [(), ("compute.num_actors=2",)])
def test_one_cpu_captions(sets: tuple[str, ...], index: str, tiny_smallcap: Path, tmp_path: Path) -> None:
    write_images(f"{tmp_path}/images", 9)
    config = config_for(f"{tmp_path}/images", index, tiny_smallcap, f"{tmp_path}/out", "compute.batch_size=2", *sets)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-c", SCRIPT, config.model_dump_json()]
    root = Path(__file__).parents[2]
    subprocess.run(command, env=environment | {"PYTHONPATH": str(root)}, cwd=tmp_path, check=True, timeout=240)
    assert len(read_rows(config.out)) == 9
