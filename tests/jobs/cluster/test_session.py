import subprocess
import sys
from collections.abc import Iterator

import pyarrow as pa
import pytest

from jobs.cluster.session import limit_blocks


@pytest.mark.ray
def test_blocks_are_limited_for_one_dataset_alone(ray_session: None) -> None:
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
