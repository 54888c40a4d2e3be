"""Tars as tests need them."""

import io
import tarfile


def make_tar(*members: tuple[str, bytes]) -> bytes:
    """Returns a tar of these members, as (name, content), in this order."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()
