"""Opens tars, compressed or not, so that neither their headers nor what they hold compressed can take all memory.

A few kilobytes can say that a name has terabytes, or hold gigabytes compressed. tarfile and the decompressors of the
standard library believe both. Here a header is read only as far as an honest one goes, compressed data are inflated a
piece at a time, and a file that turns out to hold absurdly more than its bytes is given up. How large a member may be
is the reader's affair.
"""

from __future__ import annotations

import bz2
import io
import lzma
import tarfile
import zlib
from collections.abc import Callable
from typing import IO, Any, Protocol

_STREAM_BYTES = 1 << 20
_INPUT_BYTES = 64 << 10  # of a compressed file at a time
_HEADER_BYTES = 256 << 10  # of a member's headers together; a path has 4 KiB at most, an extended attribute 64 KiB
_GLOBAL_FIELDS = 100  # of pax headers that hold for all members behind them
# What a compressed tar may hold: this much, and more at this ratio. Photographs hardly shrink; deflate, which shrinks
# least of the three, makes a thousandth of zeros.
_INFLATED_BYTES, _INFLATED_RATIO = 4 << 30, 100
_XZ_BYTES = 256 << 20  # of a decompressor's window; `xz -9` takes 65 MiB

DAMAGED = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)  # OSError: bz2
_MALFORMED = (ValueError, ArithmeticError, LookupError, RecursionError)  # which tarfile raises for fields of a header


class TooLargeError(Exception):
    """A tar takes more memory or time than is allowed."""


class NoBytesError(tarfile.ReadError):
    """The tar has zero bytes, or what it holds compressed has."""


def open_tar(file: IO[bytes], stream_bytes: int = _STREAM_BYTES) -> tarfile.TarFile:
    """Opens a tar that may be compressed with gzip, bzip2 or xz, in one part or several, for reading once.

    Args:
        file: The file, at its beginning.
        stream_bytes: How many bytes are read at a time.

    Returns:
        The tar. Reading it raises `TooLargeError`, or one of `DAMAGED`.
    """
    start = file.read(6)
    file.seek(0)
    data: Any = file
    for signature, make_decoder in _COMPRESSED.items():
        if start.startswith(signature):
            data = _Inflated(file, signature, make_decoder)
    return _BoundedTar.open(fileobj=data, mode="r|", bufsize=stream_bytes, tarinfo=StrictTarInfo, encoding="utf-8")


class StrictTarInfo(tarfile.TarInfo):
    """A header that raises an error for a damaged tar, where tarfile just stops."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> StrictTarInfo:
        """Reads the next header.

        Raises:
            tarfile.ReadError: The tar is damaged, or ends without an end mark.
        """
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            if not tarfile_.offset:
                raise NoBytesError("it has zero bytes") from error
            raise tarfile.ReadError("it ends without an end mark") from error
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from error


class _BoundedTar(tarfile.TarFile):
    def next(self) -> tarfile.TarInfo | None:
        """Returns the next member; only reads a bounded number of bytes for its headers."""
        stream = self.fileobj
        self.fileobj = _HeaderReader(stream)  # type: ignore[assignment]  # it has what tarfile calls here
        try:
            member = super().next()
        except _MALFORMED as error:
            raise tarfile.ReadError(f"a header is malformed: {error}") from error
        finally:
            self.fileobj = stream
        self.members.clear()  # type: ignore[attr-defined]  # tarfile would hold every header
        if len(self.pax_headers) > _GLOBAL_FIELDS:
            raise tarfile.ReadError(f"its global headers have more than {_GLOBAL_FIELDS} fields")
        if member is not None and member.size < 0:
            raise tarfile.ReadError("a member has a negative size")
        return member


class _HeaderReader:
    """Lets tarfile read the headers of one member from a stream."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._left = stream, _HEADER_BYTES
        self.tell, self.seek = stream.tell, stream.seek

    def read(self, size: int) -> bytes:
        self._left -= size
        if self._left < 0:
            raise tarfile.ReadError(f"the header of a member has more than {_HEADER_BYTES:,} bytes")
        return bytes(self._stream.read(size))


class _Decoder(Protocol):
    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gunzip:
    """zlib's decompressor with the interface of the other two."""

    needs_input = True

    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(16 + zlib.MAX_WBITS)

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        found = self._decoder.decompress(self._decoder.unconsumed_tail + data, max_length)
        self.needs_input = len(found) < max_length  # else zlib may hold more
        return found


class _Inflated(io.RawIOBase):
    """What a compressed file holds, as a stream; zeros between its parts are passed over, and what follows the last.

    Args:
        file: The file.
        signature: The first bytes of each of its parts.
        make_decoder: Makes a decompressor of one part.
    """

    def __init__(self, file: IO[bytes], signature: bytes, make_decoder: Callable[[], _Decoder]) -> None:
        self._file, self._signature, self._make_decoder = file, signature, make_decoder
        self._decoder = make_decoder()
        self._input = b""  # what the decoder has not taken yet
        self._taken = self._inflated = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Reads some bytes; 0 at the end.

        Raises:
            TooLargeError: There are absurdly many of them, or the decompressor takes too much memory.
            EOFError: The file ends within a part.
        """
        found = b""
        while not found:
            if self._decoder.eof and not self._begin_part():
                return 0
            if self._decoder.needs_input and not self._input and not self._fill():
                raise EOFError("the compressed data end early")
            given, self._input = self._input, b""
            try:
                found = self._decoder.decompress(given, len(buffer))
            except lzma.LZMAError as error:
                if "limit" in str(error):
                    raise TooLargeError(f"it takes more than {_XZ_BYTES:,} bytes of memory to inflate") from error
                raise
        buffer[: len(found)] = found
        self._inflated += len(found)
        if self._inflated > _INFLATED_BYTES + _INFLATED_RATIO * self._taken:
            raise TooLargeError(f"its first {self._taken:,} bytes hold more than {self._inflated:,}, compressed")
        return len(found)

    def _begin_part(self) -> bool:
        """Begins with the next part; returns whether there is one."""
        self._input = self._decoder.unused_data.lstrip(b"\0")
        while len(self._input) < len(self._signature) and self._fill():
            self._input = self._input.lstrip(b"\0")
        if not self._input.startswith(self._signature):
            return False
        self._decoder = self._make_decoder()
        return True

    def _fill(self) -> bool:
        more = self._file.read(_INPUT_BYTES)
        self._input += more
        self._taken += len(more)
        return bool(more)


_COMPRESSED: dict[bytes, Callable[[], _Decoder]] = {
    b"\x1f\x8b": _Gunzip,
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_BYTES),
}
