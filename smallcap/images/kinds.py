"""The suffixes of the files that hold images."""

IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"),
    *("heic", "heif", "hif", "jxl", "jp2", "j2k", "pbm", "pgm", "ppm", "pnm"),
)
IMAGE_SUFFIXES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


def without_tar_suffix(name: str) -> str:
    """Returns the name of a tar without its suffix."""
    return name[: -max(len(suffix) for suffix in TAR_SUFFIXES if name.lower().endswith(suffix))]
