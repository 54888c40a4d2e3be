"""What is at a path, and what a command says to something that it does not show."""

from pathlib import Path

import pytest

from jobs.kinds import Kind, find_kind
from smallcap import storage
from smallcap.errors import ConfigError

FILES: dict[Kind, str] = {
    "index": "current.json",
    "run": "_run.json",
    "webdataset": "part-000-000000.tar",
    "model": "config.json",
    "training run": "train.json",
}


@pytest.mark.parametrize("kind", FILES)
def test_a_folder_is_known_by_its_files(kind: Kind, anywhere: str) -> None:
    for name in ("a.txt", FILES[kind]):
        storage.write_bytes(f"{anywhere}/{name}", b"")
    assert find_kind(anywhere) == kind
    others = [other for other in FILES if other != kind]
    with pytest.raises(ConfigError) as raised:
        find_kind(anywhere, others)
    assert raised.value.what == "This command does not show what is here."
    assert (FILES[kind] if kind != "webdataset" else "WebDataset tars") in (raised.value.found or "")
    assert all(FILES[other] in (raised.value.expected or "") for other in others if other != "webdataset")


def test_a_run_that_also_has_tars_is_a_run(tmp_path: Path) -> None:
    for name in ("_run.json", "a.tar"):
        (tmp_path / name).touch()
    assert find_kind(str(tmp_path)) == "run"


def test_names_that_are_no_folder() -> None:
    assert find_kind("demo") == "model"
    assert find_kind("s3://bucket/some.TAR") == "webdataset"
