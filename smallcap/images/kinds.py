"""The names, first bytes and largest size of files that hold images."""

from smallcap.images import jpeg_xl

IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "tif", "tiff", "avif"),
    *("heic", "heif", "hif", "jxl", "jp2", "j2k", "pbm", "pgm", "ppm", "pnm"),
)
IMAGE_SUFFIXES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
# Files that are no photographs as a rule: they are counted where they are found, and not taken.
OTHER_IMAGE_SUFFIXES = (
    *(".ico", ".icns", ".psd", ".svg", ".tga", ".pcx", ".dds", ".exr", ".hdr", ".eps", ".dib"),
    *(".jpx", ".avifs"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
)
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")

MAX_IMAGE_BYTES = 256 << 20  # of a file; larger ones are `too_large`

SIGNATURE_BYTES = 16  # are enough for `begins_like_image`
_SIGNATURES = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*"),
    *(b"\0\0\0\x0cjP  \r\n\x87\n", jpeg_xl.CONTAINER, jpeg_xl.BARE),
)
_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"mif1", b"msf1")


def ends_like_image(name: str) -> bool:
    """Says whether a name ends like that of an image, taken or not."""
    return name.lower().endswith((*IMAGE_SUFFIXES, *OTHER_IMAGE_SUFFIXES))


def begins_like_image(start: bytes) -> bool:
    """Says whether the first `SIGNATURE_BYTES` of a file are those of an image."""
    return (
        start.startswith(_SIGNATURES)
        or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")
        or (start[:2] == b"BM" and start[6:10] == bytes(4))
        or (start[4:8] == b"ftyp" and start[8:12] in _BRANDS)
    )


def without_tar_suffix(name: str) -> str:
    """Returns the name of a tar without its suffix."""
    return name[: -max(len(suffix) for suffix in TAR_SUFFIXES if name.lower().endswith(suffix))]
