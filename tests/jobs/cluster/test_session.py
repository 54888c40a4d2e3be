import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from ray.exceptions import AuthenticationError

from jobs.cluster.session import connect, limit_blocks
from smallcap.errors import RunError


@pytest.mark.ray
def test_blocks_are_limited_for_one_dataset_alone() -> None:
    import ray

    def four_tables(batch: pa.Table) -> Iterator[pa.Table]:
        for _ in range(4):
            yield pa.table({"bytes": [b"0" * 1000]})

    def blocks(limit: int | None) -> int:
        dataset = ray.data.from_arrow(pa.table({"item": [0]}))
        if limit is not None:
            limit_blocks(dataset, limit)
        return int(dataset.map_batches(four_tables, batch_format="pyarrow").materialize().num_blocks())

    assert blocks(1000) == 4
    assert blocks(None) == 1


def test_the_commands_import_ray_data_only_after_its_settings_are_made() -> None:
    code = "import sys, jobs.cli, jobs.caption, jobs.cluster.session; print('ray.data' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


class TestConnecting:
    @pytest.fixture(autouse=True)
    def init(self, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
        """The calls of `ray.init`, each with the environment that it saw, in a process that has no Ray."""
        import ray

        calls: list[dict[str, Any]] = []
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            monkeypatch.setenv(name, "")  # so that it is gone afterwards as well
            monkeypatch.delenv(name)
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(
            ray, "init", lambda **arguments: calls.append(arguments | {"environment": dict(os.environ)})
        )
        return calls

    @pytest.mark.parametrize(
        "error", [ConnectionError("no answer"), RuntimeError("version"), AuthenticationError("no")]
    )
    def test_a_cluster_that_refuses_is_one_message(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: Exception
    ) -> None:
        import ray

        def refuse(**_: Any) -> None:
            os.write(2, b"said by C++")
            raise error

        monkeypatch.setattr(ray, "init", refuse)
        with pytest.raises(RunError, match=r"cannot join(.|\n)*head:6379(.|\n)*RAY_AUTH_MODE=token"):
            connect("head:6379")
        assert capfd.readouterr().err == "said by C++"

    def test_a_local_ray_has_a_token_of_its_own_where_it_cannot_store_one(
        self, init: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        connect()
        monkeypatch.setenv("HOME", "/proc/nowhere")
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/run/secrets/ray")
        connect()
        monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
        connect()
        tokens = [call["environment"].get("RAY_AUTH_TOKEN") for call in init]
        assert tokens[:2] == [None, None]
        assert len(tokens[2]) == 64
