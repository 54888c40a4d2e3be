import tempfile
from pathlib import Path

import pytest

from smallcap.doctor import machine
from smallcap.doctor.machine import (
    check_machine,
    check_memory,
    check_open_files,
    check_shared_memory,
    check_temporary_files,
    check_threads,
    cpu_quota,
)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_a_containers_share_of_the_cores(files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    for name, text in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert cpu_quota(tmp_path) == quota


@pytest.mark.parametrize(
    ("cores", "quota", "threads", "remedy"),
    [
        (8, None, "", ""),
        (8, None, "4", ""),
        (8, None, "4,2", ""),
        (8, None, "many", "to a number, 8 at most"),
        (8, 2.5, "2", ""),
        (8, 16.0, "", ""),
        (8, 2.5, "", "OMP_NUM_THREADS=2"),
        (8, 0.5, "4", "OMP_NUM_THREADS=1"),
        (8, None, "16", "to 8 at most"),
    ],
)
def test_threads_beyond_the_cores_are_a_warning(cores: int, quota: float | None, threads: str, remedy: str) -> None:
    finding = check_threads(cores, quota, {"OMP_NUM_THREADS": threads} if threads else {})
    assert (finding.status, remedy in finding.remedy) == ("warn" if remedy else "ok", True)


def test_little_memory_and_few_files_are_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [check_memory(size << 30).status for size in (2, 8)] == ["warn", "ok"]
    limited = check_open_files(1024, 4096)
    assert (limited.status, "ulimit -n 4096" in limited.remedy) == ("warn", True)
    assert check_open_files(-1, -1).status == "ok"
    monkeypatch.setattr(machine, "_LEAST_SHARED", 1 << 60)
    assert check_shared_memory(tmp_path).status == "warn"


def test_a_machine_without_room_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert f"free in {tmp_path}" in check_temporary_files().found
    monkeypatch.setattr(machine, "_LEAST_TEMPORARY", 1 << 60)
    assert check_temporary_files().status == "warn"

    def find_none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", find_none)
    *_, last = check_machine(tmp_path)
    assert (last.subject, last.status, "TMPDIR" in last.remedy) == ("temporary files", "fail", True)
