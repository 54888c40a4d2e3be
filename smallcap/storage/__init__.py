"""The doorway to storage: every URI that smallcap reads or writes goes through here.

Local paths, `s3://` (s3fs and obstore; the endpoint from AWS_ENDPOINT_URL) and any other fsspec URL look alike to the
callers. The hot path of fetching many small objects is `smallcap.images.fetching`. This package knows nothing of
images, indexes or schemas.
"""

from smallcap.storage.files import (
    download,
    local_file,
    move_in,
    open_file,
    open_ranged,
    read_bytes,
    read_tail,
    remove,
    scratch_folder,
    sha256_file,
    update_bytes,
    upload,
    write_bytes,
)
from smallcap.storage.listing import exists, is_folder, iter_files, list_files, list_folder, modified_at, size
from smallcap.storage.s3 import s3_store
from smallcap.storage.uris import absolute, filesystem, is_glob, is_local, join, s3_endpoint

__all__ = [
    "absolute",
    "download",
    "exists",
    "filesystem",
    "is_folder",
    "is_glob",
    "is_local",
    "iter_files",
    "join",
    "list_files",
    "list_folder",
    "local_file",
    "modified_at",
    "move_in",
    "open_file",
    "open_ranged",
    "read_bytes",
    "read_tail",
    "remove",
    "s3_endpoint",
    "s3_store",
    "scratch_folder",
    "sha256_file",
    "size",
    "update_bytes",
    "upload",
    "write_bytes",
]
