"""A store that fails every few requests: the job ends with every image, and says how often it had to ask again."""

from pathlib import Path

import pytest

from jobs.captioning.record import load_run_record
from smallcap import storage
from tests.caption_runs import command_for, config_for, rows_of, undisturbed_rows, write_images
from tests.conftest import FaultProxy
from tests.job_processes import JobProcess, StartJob

pytestmark = [pytest.mark.own_ray, pytest.mark.slow]

RATES = {"slow_down": 0.06, "reset": 0.04, "truncated": 0.04, "lost": 0.02, "slow": 0.01}


def test_a_run_through_a_failing_store_loses_nothing(
    s3: str, fault_proxy_server: FaultProxy, index: str, tiny_smallcap: Path, tmp_path: Path, start_job: StartJob
) -> None:
    images, out = f"{s3}/images", f"{s3}/out"
    write_images(images, 400)
    fault_proxy_server.plan(seed=1, rates=RATES, slow_s=4)
    sets = ("input.fetch_timeout_s=2", "output.rows_per_part=64", "compute.batch_size=8", "compute.dtype=float32")
    command = command_for(images, index, tiny_smallcap, out, *sets)
    start_job(command, tmp_path / "job.log", AWS_ENDPOINT_URL=fault_proxy_server.endpoint).wait(240)
    faults = fault_proxy_server.done()
    assert all(faults[kind] for kind in RATES), faults

    rows = rows_of(out)
    assert [status for _, status, _ in rows] == ["ok"] * 400
    assert rows == undisturbed_rows(config_for(images, index, tiny_smallcap, str(tmp_path / "expected"), *sets))
    record = load_run_record(out)
    assert record is not None
    assert record.attempts[-1].fetch_retries


def test_a_store_that_blinks_is_told_and_one_that_refuses_all_stops_the_run(
    s3: str, fault_proxy_server: FaultProxy, index: str, tiny_smallcap: Path, tmp_path: Path, start_job: StartJob
) -> None:
    images, out = f"{s3}/images", f"{s3}/out"
    write_images(images, 600)
    sets = ("output.rows_per_part=64", "compute.batch_size=8", "compute.dtype=float32", "input.fetch_attempts=2")
    command = [*command_for(images, index, tiny_smallcap, out, *sets), "--storage-patience-s", "120"]
    log = tmp_path / "job.log"

    def start() -> JobProcess:
        return start_job(command, log, AWS_ENDPOINT_URL=fault_proxy_server.endpoint)

    fault_proxy_server.plan(rates={"slow": 1.0}, slow_s=4, match="/images")  # loading is to last longer than starting
    first = start()
    first.until(lambda: any(name.endswith(".parquet") for name in storage.list_folder(out)))
    fault_proxy_server.plan(rates={"error": 1.0}, error_status=403, error_code="AccessDenied", match="/images")
    first.wait(120, status=1)
    printed = log.read_text()
    assert "error: Cannot read from this place any more: access denied" in printed
    assert "What was captioned is kept" in printed
    assert "Debug" not in printed
    assert "Traceback" not in printed
    kept = rows_of(out)
    assert {status for _, status, _ in kept} == {"ok"}
    assert 0 < len(kept) < 600

    fault_proxy_server.plan(rates={"slow_down": 1.0}, for_s=20)
    start().wait(240)
    printed = log.read_text()
    assert "Storage does not answer" in printed
    assert "Storage answers again" in printed
    rows = rows_of(out)
    assert [status for _, status, _ in rows] == ["ok"] * 600
    assert rows == undisturbed_rows(config_for(images, index, tiny_smallcap, str(tmp_path / "expected"), *sets))
