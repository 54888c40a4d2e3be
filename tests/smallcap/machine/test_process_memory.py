import mmap
import sys
from pathlib import Path

import pytest

from smallcap.machine.process_memory import available_bytes, private_bytes, return_freed_memory, total_bytes

GB = 1 << 30


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


def test_this_machine_has_memory_and_this_process_more_when_it_writes() -> None:
    assert 1 << 20 < available_bytes() < 1 << 50
    before = private_bytes()
    with mmap.mmap(
        -1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    ) as held:  # malloc may have freed memory left to give
        held.write(b"x" * len(held))
        assert 32 << 20 < private_bytes() - before < 512 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="malloc is glibc's")
def test_what_is_freed_in_the_middle_of_the_heap_goes_back_to_the_system() -> None:
    blocks = [b"x" * (64 << 10) for _ in range(2048)]  # 128 MiB, each too small to be mapped by itself
    at_the_end = b"x" * (64 << 10)
    before = private_bytes()
    del blocks
    return_freed_memory()
    assert before - private_bytes() > 100 << 20
    assert len(at_the_end) == 64 << 10


def limit(most: int | str, used: int, inactive: str) -> dict[str, str]:
    return {"memory.max": str(most), "memory.current": str(used), "memory.stat": f"anon 1{inactive}"}


VERSION_1 = {
    "memory/memory.limit_in_bytes": str(4 * GB),
    "memory/memory.usage_in_bytes": str(3 * GB),
    "memory/memory.stat": f"cache 7\ntotal_inactive_file {GB}",
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8 * GB),
        (limit(6 * GB, 5 * GB, f"\ninactive_file {2 * GB}"), 3 * GB),
        (limit("max", 5 * GB, ""), 8 * GB),
        (VERSION_1, 2 * GB),
        (limit(GB, 2 * GB, ""), 0),
        (limit("what", 5, ""), 8 * GB),
    ],
)
def test_a_containers_limit_counts(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    write(tmp_path, {"proc/meminfo": f"MemTotal: 99999999 kB\nMemAvailable: {8 * GB // 1024} kB"})
    write(tmp_path, {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert available_bytes(tmp_path) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"memory.max": str(3 * GB)}, 3 * GB),
        ({"memory.max": "max"}, None),
        ({"memory/memory.limit_in_bytes": str(2 * GB)}, 2 * GB),
    ],
    ids=["none", "limit", "max", "version 1"],
)
def test_the_memory_of_a_container_is_its_limit(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    write(tmp_path / "sys/fs/cgroup", files)
    machine = total_bytes()
    assert total_bytes(tmp_path) == min(expected or machine, total_bytes(tmp_path / "none"))
