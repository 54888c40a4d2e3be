"""A bucket that fails in the middle of a run stops it; what was captioned is kept, and the same call goes on."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import caption
from smallcap import storage
from smallcap.errors import StorageError
from smallcap.images import place_check
from smallcap.storage_faults import this_node
from tests.caption_runs import config_for, jpeg, rows_of


@pytest.mark.parametrize(
    ("status", "code", "found"), [(403, "AccessDenied", "access denied"), (400, "ExpiredToken", "they have expired")]
)
def test_a_bucket_that_refuses_everything_from_some_moment_on(
    status: int,
    code: str,
    found: str,
    s3: str,
    fault_proxy: Any,
    index: str,
    tiny_smallcap: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(place_check, "_served", {})
    for number in range(6):
        table = pa.table({"image": pa.array([jpeg(8 * number + row) for row in range(8)], pa.binary())})
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer)
        storage.write_bytes(f"{s3}/images/{number}.parquet", buffer.getvalue().to_pybytes())
    undisturbed = config_for(f"{s3}/images", index, tiny_smallcap, str(tmp_path / "undisturbed"))
    fault_proxy.plan()
    caption.run(undisturbed)
    requests = fault_proxy.done()["requests"]

    config = undisturbed.model_copy(update={"out": str(tmp_path / "out")})
    fault_proxy.plan(rates={"error": 1.0}, error_status=status, error_code=code, begins_at=requests * 3 // 4)
    with pytest.raises(StorageError, match=found) as raised:
        caption.run(config)
    message = str(raised.value)
    assert "What was captioned is kept" in message
    assert "the same command goes on" in message
    assert this_node() in message
    assert s3 in message
    assert len(message.splitlines()) <= 4
    kept = rows_of(config.out)
    assert 0 < len(kept) < 48
    assert {status for _, status, _ in kept} == {"ok"}

    fault_proxy.plan()
    caption.run(config)
    assert rows_of(config.out) == rows_of(undisturbed.out)
