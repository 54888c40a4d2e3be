"""Tells what smallcap has written in a folder, by the names of the files there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from jobs.training.record import RECORD_FILE
from smallcap import storage
from smallcap.errors import ConfigError
from smallcap.index.manifest import POINTER_FILE
from smallcap.model.files import DEMO
from smallcap.output.part_files import RUN_FILE
from smallcap.output.variant_runs import VARIANTS_FILE
from smallcap.phrasing import describe_count

Kind = Literal["index", "run", "variants", "webdataset", "model", "training run"]

MODEL_FILE = "config.json"
TAR = ".tar"
_DESCRIPTIONS: dict[Kind, str] = {
    "index": f"an index ({POINTER_FILE})",
    "run": f"a run ({RUN_FILE})",
    "variants": f"variants ({VARIANTS_FILE})",
    "webdataset": "WebDataset tars",
    "model": f"a model ({MODEL_FILE})",
    "training run": f"a training run ({RECORD_FILE})",
}


def find_kind(path: str, expected: Sequence[Kind] = get_args(Kind)) -> Kind:
    """Returns what is at a path.

    Args:
        path: A folder or prefix, a tar, or the name of the demo's model.
        expected: The kinds that the caller can use.

    Raises:
        ConfigError: There is nothing that smallcap knows, or something of another kind.
        RunError: The storage fails.
    """
    names = set() if path.lower().endswith(TAR) else {uri.rpartition("/")[2] for uri in storage.list_folder(path)}
    is_there: dict[Kind, bool] = {
        "index": POINTER_FILE in names,
        "run": RUN_FILE in names,
        "variants": VARIANTS_FILE in names,
        "webdataset": path.lower().endswith(TAR) or any(name.endswith(TAR) for name in names),
        "model": MODEL_FILE in names or path == DEMO,
        "training run": RECORD_FILE in names,
    }
    kind = next((kind for kind, found in is_there.items() if found), None)
    if kind is not None and kind in expected:
        return kind
    others = describe_count(len(names), "other file") if names else "no such folder, or an empty one"
    raise ConfigError(
        "This command does not show what is here." if kind else "There is nothing here that smallcap has written.",
        where=path,
        expected=" or ".join(_DESCRIPTIONS[one] for one in expected),
        found=_DESCRIPTIONS[kind] if kind else others,
    )
