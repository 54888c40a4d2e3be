from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def test_the_cluster_file_passes_rays_own_check() -> None:
    private = pytest.importorskip("ray.autoscaler._private.util")
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    private.validate_config(private.prepare_config(config))


def test_the_cluster_installs_what_is_beside_it() -> None:
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    assert config["file_mounts"] == {"~/smallcap": "."}
    assert any("~/smallcap/constraints.txt" in command for command in config["setup_commands"])
    assert (ROOT / "constraints.txt").is_file()
