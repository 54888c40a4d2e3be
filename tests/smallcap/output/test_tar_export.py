"""A run's captions as WebDataset tars: images from the run's own tars or from where they were, each caption once."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from smallcap import storage
from smallcap.config import InputConfig
from smallcap.errors import ConfigError
from smallcap.output.reading import read_captions
from smallcap.output.tar_export import NEEDED_COLUMNS, TarExport
from smallcap.output.webdataset import read_samples
from tests.caption_runs import Killed, killed_at
from tests.written_runs import CAPTIONED, write_run

GOLDEN = Path(__file__).parents[2] / "golden" / "run_v1"


def contents(out: str) -> dict[str, bytes]:
    """All files in the tars of a folder, by name."""
    found: dict[str, bytes] = {}
    for uri in storage.list_files(out, (".tar",)):
        with tarfile.open(fileobj=io.BytesIO(storage.read_bytes(uri))) as tar:
            for member in tar:
                assert member.name not in found
                file = tar.extractfile(member)
                assert file is not None
                found[member.name] = file.read()
    return found


def export(run: str, with_images: bool = True, columns: tuple[str, ...] = NEEDED_COLUMNS) -> TarExport:
    return TarExport(read_captions(run, status="ok"), "run", columns, InputConfig() if with_images else None)


def test_without_images_there_are_texts_alone(anywhere: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert export(run, with_images=False).write(anywhere) == (12, {})
    files = contents(anywhere)
    assert sorted(files) == sorted(f"{name}.{ending}" for name in CAPTIONED for ending in ("txt", "json"))
    assert files["2-1.txt"].decode() == "café 2-1"
    assert json.loads(files["2-1.json"]) == {"image_id": "2-1", "caption": "café 2-1", "image_uri": "2-1"}


def test_images_are_taken_from_the_runs_own_tars(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, run := tmp_path / "run")
    columns = tuple(read_captions(run).schema.names)
    assert export(str(run), columns=columns).write(str(tmp_path / "out")) == (2, {})
    (own,) = (run / "_webdataset").iterdir()
    with tarfile.open(own) as tar:
        expected = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    files = contents(str(tmp_path / "out"))
    assert files.keys() == expected.keys()
    for name, content in files.items():
        if not name.endswith(".json"):
            assert content == expected[name]
        else:  # it has the columns that the run's own tars leave out as well
            assert json.loads(expected[name]).items() <= json.loads(content).items()


@pytest.mark.parametrize("step", range(6))
def test_an_export_that_was_killed_goes_on(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = write_run(tmp_path / "run"), str(tmp_path / "out")
    with killed_at(step, monkeypatch), pytest.raises(Killed):
        export(run, with_images=False).write(out)
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert export(run, with_images=False).write(out) == (12, {})
    assert len(contents(out)) == 24
    records = {path.stem for path in (tmp_path / "out" / "_export").glob("part-*.json")}
    assert len(records) == len(list((tmp_path / "out").glob("*.tar"))) == 4
    assert len(written) == (step + 1) // 3  # the record goes, the tar comes, the record comes


def test_tars_of_parts_that_the_run_has_no_more_are_removed(anywhere: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    export(run, with_images=False).write(anywhere)
    (tmp_path / "run" / "part-001-000002.parquet").unlink()
    assert export(run, with_images=False).write(anywhere) == (9, {})
    assert len(contents(anywhere)) == 18
    samples = [sample for uri in storage.list_files(anywhere, (".tar",)) for sample in read_samples(uri)]
    assert {sample["image_id"][0] for sample in samples} == {"0", "1", "3"}


def test_what_is_not_an_export_of_the_run_is_not_replaced(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="folder is not empty"):
        export(run, with_images=False).write(run)
    captions = read_captions(run, status="ok")
    TarExport(captions, "other", NEEDED_COLUMNS).write(str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="not an export of this run"):
        TarExport(captions, "run", NEEDED_COLUMNS).write(str(tmp_path / "out"))


def test_datasets_reads_the_tars(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    shutil.copytree(GOLDEN, tmp_path / "run")
    export(str(tmp_path / "run")).write(str(tmp_path / "out"))
    files = {"train": str(tmp_path / "out" / "*.tar")}
    found = datasets.load_dataset("webdataset", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    expected = read_captions(GOLDEN, ["image_id", "caption"], "ok").to_arrow().to_pylist()
    assert [{name: row["json"][name] for name in ("image_id", "caption")} for row in found] == expected
    assert {row["jpg"].format for row in found} == {"JPEG"}
