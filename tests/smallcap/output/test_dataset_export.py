"""A run's captions as a Hugging Face data set: `datasets` reads each row once, in a folder and from a Hub."""

import io
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from smallcap import storage
from smallcap.errors import ConfigError, SchemaError, StorageError
from smallcap.output import dataset_export
from smallcap.output.dataset_export import export_dataset
from smallcap.output.reading import read_captions
from tests.hub_server import Hub
from tests.python_process import run_python
from tests.written_runs import CAPTIONED, FAILED, write_run

CARD = ["# Captions", "of a run"]


def loaded(folder: str, cache: Path) -> list[str]:
    """The ids that `datasets` reads from a local folder."""
    datasets = pytest.importorskip("datasets")
    return sorted(datasets.load_dataset(folder, split="train", cache_dir=str(cache))["image_id"])


def test_a_folder_has_every_caption_once_however_often_it_is_exported(tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run"), str(tmp_path / "set")
    captions = read_captions(run, status="ok")
    assert not export_dataset(captions, "run", CARD, out)
    assert loaded(out, tmp_path / "cache") == CAPTIONED
    _, head, text = (tmp_path / "set" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["task_categories"] == ["image-to-text"]
    assert text == "\n# Captions\nof a run\n"
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*"))
    assert export_dataset(captions, "run", CARD, out)
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")) == before
    export_dataset(read_captions(run), "run", CARD, out)  # now with those that failed
    assert loaded(out, tmp_path / "cache") == sorted([*CAPTIONED, *FAILED])


def test_a_data_set_of_a_run_without_captions_has_its_columns(tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run", rows=0), str(tmp_path / "set")
    export_dataset(read_captions(run, status="ok"), "run", CARD, out)
    (file,) = (tmp_path / "set").rglob("*.parquet")
    assert (len(pq.read_table(file)), pq.read_schema(file)) == (0, read_captions(run).schema)


def test_files_end_where_they_are_large_enough(anywhere: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_export, "_FILE_ROWS", 5)
    export_dataset(read_captions(write_run(tmp_path / "run"), status="ok"), "run", CARD, anywhere)
    files = storage.list_files(anywhere, (".parquet",))
    assert [file.rpartition("/")[2] for file in files] == ["00000.parquet", "00001.parquet"]


KILLED = """
import os
from smallcap.output import dataset_export, reading

dataset_export._FILE_ROWS = 5
of_part = reading.Captions.of_part

def dies(self, name):
    if name.endswith("3.parquet"):
        os._exit(9)
    yield from of_part(self, name)

reading.Captions.of_part = dies
dataset_export.export_dataset(reading.read_captions(os.environ["RUN"], status="ok"), "run", [], os.environ["PLACE"])
"""


def test_an_export_that_was_killed_is_repeated(tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run"), str(tmp_path / "set")
    export_dataset(read_captions(run), "run", CARD, out)
    with pytest.raises(subprocess.CalledProcessError) as killed:
        run_python(KILLED, RUN=run, PLACE=out)
    assert killed.value.returncode == 9, killed.value.stderr
    assert len(list((tmp_path / "set").glob("captions-*"))) == 2
    assert loaded(out, tmp_path / "cache") == sorted([*CAPTIONED, *FAILED])
    export_dataset(read_captions(run, status="ok"), "run", CARD, out)
    assert len(list((tmp_path / "set").glob("captions-*"))) == 1
    assert loaded(out, tmp_path / "cache") == CAPTIONED


def test_what_is_not_an_export_of_the_run_is_not_replaced(tmp_path: Path) -> None:
    captions = read_captions(write_run(tmp_path / "run"))
    with pytest.raises(ConfigError, match="folder is not empty"):
        export_dataset(captions, "run", CARD, str(tmp_path / "run"))
    export_dataset(captions, "other", CARD, str(tmp_path / "set"))
    with pytest.raises(ConfigError, match="not an export of this run") as refused:
        export_dataset(captions, "run", CARD, str(tmp_path / "set"))
    assert refused.value.found == "an export of run other"
    (tmp_path / "set" / "README.md").write_text("# My own\n")
    with pytest.raises(ConfigError, match="not an export of this run") as refused:
        export_dataset(captions, "other", CARD, str(tmp_path / "set"))
    assert refused.value.found == "something that smallcap did not write"


def hub_ids(hub: Hub) -> list[str]:
    """The ids in the Parquet files of the newest commit, and that its README.md names their folder."""
    files = hub.repositories["datasets/user/captions"].files
    parquet = [path for path in files if path.endswith(".parquet")]
    assert len({path.partition("/")[0] for path in parquet}) == 1
    assert f'"{parquet[0].partition("/")[0]}/*.parquet"' in files["README.md"].decode()
    return sorted(name for path in parquet for name in pq.read_table(io.BytesIO(files[path]))["image_id"].to_pylist())


def test_an_export_to_the_hub_is_one_commit(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_export, "_FILE_ROWS", 5)
    monkeypatch.setenv("HF_TOKEN", "secret")
    repository = hub.dataset("user/captions", {"LICENSE": b"theirs"}, token="secret")
    run, out = write_run(tmp_path / "run"), "hf://datasets/user/captions"
    assert not export_dataset(read_captions(run, status="ok"), "run", CARD, out)
    assert hub_ids(hub) == CAPTIONED
    assert export_dataset(read_captions(run, status="ok"), "run", CARD, out)
    assert repository.messages == ["initial commit", "Captions of the smallcap run run"]
    export_dataset(read_captions(run), "run", CARD, f"{out}@main")
    assert hub_ids(hub) == sorted([*CAPTIONED, *FAILED])
    assert (len(repository.commits), repository.files["LICENSE"]) == (3, b"theirs")
    with pytest.raises(ConfigError, match="not an export of this run"):
        export_dataset(read_captions(run), "another", CARD, out)


def test_an_export_that_fails_makes_no_commit(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = hub.dataset("user/captions", {})
    run, out = write_run(tmp_path / "run"), "hf://datasets/user/captions"
    captions = read_captions(run)
    part = tmp_path / "run" / "part-001-000003.parquet"
    content = part.read_bytes()
    part.write_bytes(b"PAR1")
    with pytest.raises(SchemaError):
        export_dataset(captions, "run", CARD, out)
    part.write_bytes(content)
    write_files = dataset_export._write_files

    def meanwhile(*arguments: object) -> object:
        repository.commits.append(repository.files | {"other.txt": b""})
        return write_files(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(dataset_export, "_write_files", meanwhile)
    with pytest.raises(StorageError, match="Somebody has changed the data set"):
        export_dataset(captions, "run", CARD, out)
    assert set(repository.files) == {".gitattributes", "other.txt"}


@pytest.mark.parametrize("out", ["hf://datasets/user/captions/folder", "hf://user/model"])
def test_only_a_data_set_as_a_whole_is_a_place_on_the_hub(out: str, hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no data set of the Hugging Face Hub"):
        export_dataset(read_captions(write_run(tmp_path / "run")), "run", CARD, out)


def test_a_data_set_that_does_not_exist_is_not_made(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="has no such repository") as missing:
        export_dataset(read_captions(write_run(tmp_path / "run")), "run", CARD, "hf://datasets/user/captions")
    assert "HF_TOKEN" in missing.value.remedy
