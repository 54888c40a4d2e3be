"""The names, first bytes and largest size of files that hold images."""

from smallcap.images import jpeg_xl

IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "tif", "tiff", "avif"),
    *("heic", "heif", "hif", "jxl", "jp2", "j2k", "pbm", "pgm", "ppm", "pnm"),
)
IMAGE_SUFFIXES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
# Files that are not photographs as a rule: they are counted where they are found, and not taken.
OTHER_IMAGE_SUFFIXES = (
    *(".ico", ".icns", ".cur", ".psd", ".psb", ".xcf", ".svg", ".svgz", ".eps", ".wmf", ".emf", ".djvu"),
    *(".tga", ".pcx", ".dds", ".dib", ".sgi", ".ras", ".xbm", ".xpm", ".pam", ".pfm", ".qoi", ".exr", ".hdr", ".fits"),
    *(".jif", ".jfi", ".pjp", ".pjpeg", ".jps", ".mpo", ".jpx", ".jpf", ".j2c", ".jpc", ".jph", ".jxr", ".wdp"),
    *(".avifs", ".heics", ".heifs", ".jpg_large", ".jpg_orig"),
    *(".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".sr2", ".srw", ".orf", ".rw2", ".raf", ".pef", ".x3f"),
)
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
# They may hold images, but are not read: they are counted where they are found.
ARCHIVE_SUFFIXES = (
    *(".zip", ".7z", ".rar", ".tar.zst", ".tzst", ".tar.lz4", ".tar.lzma", ".tlz", ".tar.br", ".tar.z", ".tbz", ".tb2"),
    *(".cbz", ".cbr", ".cpio"),
)
# What lies beside images by the thousand and is not opened to see whether it begins like one.
SIDECAR_SUFFIXES = (
    *(".txt", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".xml", ".npy", ".npz", ".gz", ".md", ".html"),
    *(".caption", ".cls", ".yaml", ".yml", ".log", ".py", ".pt", ".safetensors", ".mp4", ".wav", ".pdf"),
)

MAX_IMAGE_BYTES = 256 << 20  # of a file; larger ones are `too_large`

SIGNATURE_BYTES = 16  # are enough for `begins_like_image`
_SIGNATURES = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*"),
    *(b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51", jpeg_xl.CONTAINER, jpeg_xl.BARE),
    *(b"II+\0", b"MM\0+", b"8BPS", b"icns", b"\0\0\x01\0", b"DDS ", b"qoif", b"#?RADIANCE", b"\x76\x2f\x31\x01"),
)
AVIF_BRANDS = (b"avif", b"avis")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def ends_like_image(name: str) -> bool:
    """Says whether a name ends like that of an image, taken or not."""
    return name.lower().removesuffix(".gz").endswith((*IMAGE_SUFFIXES, *OTHER_IMAGE_SUFFIXES))


def begins_like_image(start: bytes) -> bool:
    """Says whether the first `SIGNATURE_BYTES` of a file are those of an image."""
    return (
        start.startswith(_SIGNATURES)
        or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")
        or (start[:2] == b"BM" and start[6:10] == bytes(4))
        or (start[4:8] == b"ftyp" and start[8:12] in AVIF_BRANDS + HEIF_BRANDS)
    )


def without_tar_suffix(name: str) -> str:
    """Returns the name of a tar without its suffix."""
    return name[: -max(len(suffix) for suffix in TAR_SUFFIXES if name.lower().endswith(suffix))]
