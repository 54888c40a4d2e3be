import mmap
from pathlib import Path

import pytest

from smallcap.machine.process_memory import available_bytes, private_bytes

GB = 1 << 30


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


def test_this_machine_has_memory() -> None:
    assert 1 << 20 < available_bytes() < 1 << 50


def test_memory_of_ones_own_grows_with_what_is_written() -> None:
    before = private_bytes()
    with mmap.mmap(
        -1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    ) as held:  # malloc may have freed memory left to give
        held.write(b"x" * len(held))
        assert 32 << 20 < private_bytes() - before < 512 << 20


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8 * GB),
        (
            {
                "memory.max": str(6 * GB),
                "memory.current": str(5 * GB),
                "memory.stat": f"anon 1\ninactive_file {2 * GB}",
            },
            3 * GB,
        ),
        ({"memory.max": "max", "memory.current": str(5 * GB), "memory.stat": "anon 1"}, 8 * GB),
        (
            {
                "memory/memory.limit_in_bytes": str(4 * GB),
                "memory/memory.usage_in_bytes": str(3 * GB),
                "memory/memory.stat": f"cache 7\ntotal_inactive_file {GB}",
            },
            2 * GB,
        ),
        ({"memory.max": str(GB), "memory.current": str(2 * GB), "memory.stat": "anon 1"}, 0),
        ({"memory.max": "what", "memory.current": "5", "memory.stat": "anon 1"}, 8 * GB),
    ],
)
def test_a_containers_limit_counts(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    write(tmp_path, {"proc/meminfo": f"MemTotal: 99999999 kB\nMemAvailable: {8 * GB // 1024} kB"})
    write(tmp_path, {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert available_bytes(tmp_path) == expected
