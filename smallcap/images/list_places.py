"""Says which places a list may name: one that comes from storage or the web must not reach into this machine.

A list on a local disk may name anything; whoever put it there can read those files anyway. A list from elsewhere may
have been written by others. It may name object stores, the Hugging Face Hub, the web (whose hosts
`smallcap.images.public_addresses` judges), and what lies below its own folder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from smallcap import storage

REFUSED = "refused://"  # before a place that a list may not name; no client knows such a protocol
_WHOLE = re.compile("(?:s3|hf|https?)://", re.IGNORECASE)  # read by clients that know no chained URLs
_CHAINED = re.compile("(?:gs|gcs|az|abfss?)://", re.IGNORECASE)  # fsspec may read these


def with_refusals(uris: Sequence[str], list_uri: str, folder: str = "") -> list[str]:
    """Returns the places that a list names; before those that it may not name stands `REFUSED`.

    Args:
        uris: Absolute places, or empty.
        list_uri: The list.
        folder: The folder that its relative places start from; by default the list's own.
    """
    if storage.is_local(list_uri):
        return list(uris)
    below = f"{(folder or list_uri.rsplit('/', 1)[0]).rstrip('/')}/"
    return [uri if not uri or _may_be_named(uri, below) else f"{REFUSED}{uri}" for uri in uris]


def _may_be_named(uri: str, below: str) -> bool:
    if _WHOLE.match(uri):
        return True
    rest = uri.removeprefix(below)
    if "::" in rest:
        return False
    return bool(_CHAINED.match(uri)) or (rest != uri and ".." not in rest.split("/"))
