import struct
from pathlib import Path

import faiss

from smallcap.doctor.devices import faiss_architectures
from smallcap.doctor.fatbins import architectures_of


def container(*entries: tuple[int, int, int]) -> bytes:
    """Code for GPUs as it lies in a library: kind, architecture and bytes of each piece."""
    pieces = [struct.pack("<HHIQ12xI", kind, 1, 32, size, number) + bytes(size) for kind, number, size in entries]
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, sum(map(len, pieces))) + b"".join(pieces)


def test_the_architectures_of_all_containers_are_found(tmp_path: Path) -> None:
    library = tmp_path / "lib.so"
    library.write_bytes(b"\x7fELF" + container((2, 80, 40), (1, 90, 8)) + bytes(100) + container((2, 75, 3)))
    assert architectures_of(library) == {"sm_80", "compute_90", "sm_75"}


def test_bytes_that_only_look_like_a_container_are_passed_over(tmp_path: Path) -> None:
    library = tmp_path / "lib.so"
    magic = struct.pack("<I", 0xBA55ED50)
    wrong_version, cut = magic + bytes(60), container((2, 80, 40))[:20]
    library.write_bytes(wrong_version + container((7, 80, 4)) + container((2, 90, 4)) + cut)
    assert architectures_of(library) == {"sm_90"}


def test_the_installed_faiss() -> None:
    found = faiss_architectures()
    assert bool(found) == hasattr(faiss, "StandardGpuResources")
    assert all(name.rpartition("_")[0] in ("sm", "compute") for name in found)
