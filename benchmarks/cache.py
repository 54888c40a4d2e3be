"""Times how a node's cache opens a remote index: when it has nothing, when all is there, and when a byte has changed.

The index lies on an S3 server on the loopback. What a process reads is counted by the kernel, downloads included.

    python -m benchmarks.cache --captions 1000000

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measuring import say
from benchmarks.s3_server import serve_s3
from smallcap import storage
from smallcap.benchmark import random_content
from smallcap.index.manifest import EncoderIdentity, IndexManifest
from smallcap.index.node_cache import open_version_folder
from smallcap.machine.description import describe_machine

_BUCKET = "cache"
_DIM = 512


def bytes_read() -> int:
    """Returns the bytes that this process has read so far, from files and sockets."""
    (line,) = (line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar"))
    return int(line.split()[1])


def measure(what: str, open_index: Callable[[], object]) -> dict[str, Any]:
    """Returns the seconds and the bytes that opening takes."""
    began, read = time.perf_counter(), bytes_read()
    open_index()
    seconds, read = time.perf_counter() - began, bytes_read() - read
    say(f"{what}: {seconds:.3f} s, {read / 1e6:,.3f} MB read")
    return {"what": what, "s": seconds, "read_bytes": read}


def flip_byte(path: Path) -> None:
    """Changes a byte in the middle of a file."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0xFF]))


def upload_index(work: Path, captions: int, uri: str) -> IndexManifest:
    """Writes an index of random vectors and captions to storage."""
    folder = work / "index"
    folder.mkdir()
    vectors, texts = random_content.random_vectors(captions, _DIM), random_content.random_captions(captions)
    identity = EncoderIdentity(spec="random", weights_sha256="", dim=_DIM)
    manifest = random_content.write_index(folder, vectors, texts, identity)
    for entry in manifest.files:
        storage.upload(folder / entry.file, storage.join(uri, entry.file))
        (folder / entry.file).unlink()
    return manifest


def main() -> None:
    """Prints each opening."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--captions", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="smallcap-cache-") as folder:
        work = Path(folder)
        with serve_s3(work / "s3", _BUCKET):
            uri, cache = f"s3://{_BUCKET}/index", work / "cache"
            manifest = upload_index(work, options.captions, uri)

            def open_index() -> object:
                return open_version_folder(uri, manifest, str(cache))

            rows = [measure("nothing in the cache", open_index), measure("all in the cache", open_index)]
            flip_byte(max((cache / entry.file for entry in manifest.files), key=lambda path: path.stat().st_size))
            rows.append(measure("a byte of the largest file changed", open_index))
    megabytes = sum(entry.bytes for entry in manifest.files) / 1e6
    say(f"The index has {options.captions:,} captions and {megabytes:,.0f} MB.")
    print(json.dumps({"machine": describe_machine(os.cpu_count() or 1), "mb": megabytes, "openings": rows}))


if __name__ == "__main__":
    main()
