"""Files as a run's images come in."""

import io
import tarfile
from pathlib import Path


def make_tar(*members: tuple[str, bytes]) -> bytes:
    """Returns a tar of these members, as (name, content), in this order."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


def write_files(folder: Path, *names: str, content: bytes = b"x") -> Path:
    """Writes files of one content, with the folders that their names need; returns the folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder
