"""A run's captions as other files: every image once, nothing lost, and nothing that a spreadsheet would run."""

import csv
import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from jobs import caption
from jobs.cli import app
from smallcap import storage
from smallcap.errors import ConfigError
from smallcap.images.row_ranges import RowRanges
from smallcap.output.export import export_captions
from smallcap.output.part_files import PartInfo, list_parts, write_part
from smallcap.output.reading import read_captions
from smallcap.output.schema import caption_schema
from tests.caption_runs import config_for, jpeg, write_images
from tests.hub_server import Hub
from tests.input_files import make_tar

RUN = str(Path(__file__).parents[1] / "golden" / "run_v1")


def export(*arguments: str, run: str = RUN) -> str:
    return CliRunner().invoke(app, ["export", run, *arguments], catch_exceptions=False).output


def test_json_lines_hold_all_that_the_parts_do(anywhere: str) -> None:
    assert export("--to", "jsonl", "--out", f"{anywhere}/a.jsonl") == f"2 rows: {anywhere}/a.jsonl\n"
    rows = [json.loads(line) for line in storage.read_bytes(f"{anywhere}/a.jsonl").splitlines()]
    assert rows == read_captions(RUN, status="ok").to_arrow().to_pylist()
    export("--to", "jsonl", "--out", f"{anywhere}/a.jsonl.gz", "--failed", "--columns", "error_code,image_id")
    lines = gzip.decompress(storage.read_bytes(f"{anywhere}/a.jsonl.gz")).splitlines()
    assert [list(json.loads(line).values()) for line in lines] == [
        [None, "10000000.jpg"],
        [None, "10000001.jpg"],
        ["not_an_image", "broken.jpg"],
    ]


def test_csv_is_read_as_it_was_written(anywhere: str) -> None:
    export("--to", "csv", "--out", f"{anywhere}/a.csv")
    rows = list(csv.DictReader(io.StringIO(storage.read_bytes(f"{anywhere}/a.csv").decode(), newline="")))
    expected = read_captions(RUN, status="ok").to_arrow().to_pylist()
    assert list(rows[0]) == list(expected[0])
    for row, given in zip(rows, expected, strict=True):
        assert row["caption"] == given["caption"]
        assert json.loads(row["neighbours"]) == given["neighbours"]
        assert float(row["caption_logprob"]) == given["caption_logprob"] < 0
        assert row["error_code"] == ""


@pytest.mark.parametrize("raw", [False, True])
def test_a_spreadsheet_runs_no_caption_unless_it_is_wanted(raw: bool, tmp_path: Path) -> None:
    texts = ["=HYPERLINK(1)", "+1", "-1", "@a", "\ta", 'a "dog", =1', "line\nline", "café"]
    schema = caption_schema("run", "model", "index")
    table = pa.Table.from_pylist(
        [{"image_id": str(n), "status": "ok", "caption": text} for n, text in enumerate(texts)], schema=schema
    )
    info = PartInfo({0: RowRanges.of(np.arange(len(texts)))}, {}, (0,), len(texts), {})
    write_part(str(tmp_path), "part-001-000000.parquet", table, info, schema)
    captions = read_captions(tmp_path, "caption")
    assert export_captions(captions, str(tmp_path / "a.csv"), "csv", raw) == len(texts)
    with (tmp_path / "a.csv").open(newline="") as file:
        found = [row["caption"] for row in csv.DictReader(file)]
    assert found == (texts if raw else [f"'{text}" for text in texts[:5]] + texts[5:])
    export_captions(captions, str(tmp_path / "a.jsonl"), "jsonl")
    assert [json.loads(line)["caption"] for line in (tmp_path / "a.jsonl").read_text().splitlines()] == texts


def test_an_export_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("before")
    with pytest.raises(ConfigError, match="no such column"):
        export("--to", "jsonl", "--out", str(tmp_path / "a.jsonl"), "--columns", "image_id,captoin")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_a_card_says_what_made_the_captions(tmp_path: Path) -> None:
    export("--to", "card", "--out", str(tmp_path / "README.md"))
    _, head, text = (tmp_path / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["configs"] == [{"config_name": "default", "data_files": "part-*.parquet"}]
    assert "generated for 2 images.\n1 image failed: 1 not_an_image." in text
    for said in ("`demo@e2a6d95a4e14`", "`num_captions=2`", "| `licence` | `int32` |"):
        assert said in text


@pytest.mark.parametrize("kind", ["delta", "lance", "hf"])
def test_a_table_or_a_data_set_is_made_once(kind: str, tmp_path: Path) -> None:
    pytest.importorskip({"delta": "deltalake", "lance": "lance", "hf": "datasets"}[kind])
    out = str(tmp_path / "out")
    assert export("--to", kind, "--out", out) == f"2 rows: {out}\n"
    assert export("--to", kind, "--out", out) == f"2 rows: {out}; they were there already\n"
    if kind == "hf":
        assert "generated for 2 images" in (tmp_path / "out" / "README.md").read_text()


def test_a_data_set_on_the_hub_is_one_commit(hub: Hub) -> None:
    repository = hub.dataset("user/captions", {})
    out = "hf://datasets/user/captions"
    assert export("--to", "hf", "--out", out, "--columns", "image_id,caption") == f"2 rows: {out}\n"
    assert len(repository.commits) == 2
    (parquet,) = [data for path, data in repository.files.items() if path.endswith(".parquet")]
    assert pq.read_table(io.BytesIO(parquet)).column_names == ["image_id", "caption"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--to", "webdataset", "--out", "out", "--failed"), "tars have captioned images only"),
        (("--to", "lance", "--out", "out", "--no-images"), "only tars have images"),
        (("--to", "jsonl", "--out", "hf://datasets/user/captions"), "only --to hf writes to the Hugging Face Hub"),
    ],
)
def test_options_that_do_not_fit_the_format_are_refused(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        export(*arguments)
    assert said in str(refused.value)


def contents(folder: Path) -> dict[str, bytes]:
    """All files in the tars of a folder, by name."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                assert found.setdefault(member.name, file.read()) is not None
    return found


@pytest.fixture
def run_of_three_kinds(tmp_path: Path, index: str, tiny_smallcap: Path) -> tuple[str, dict[str, bytes]]:
    """A run over a folder, a tar and a Parquet file, with its images by id; one of them is damaged."""
    write_images(str(tmp_path / "folder"), 6)
    (tmp_path / "folder" / "bad.jpg").write_bytes(b"no image")
    tar = make_tar(*((f"t{number}.jpg", jpeg(20 + number)) for number in range(5)))
    (tmp_path / "some.tar").write_bytes(tar)
    rows = {"image_id": [f"p{number}" for number in range(4)], "image": [jpeg(40 + number) for number in range(4)]}
    pq.write_table(pa.table(rows), tmp_path / "some.parquet")
    sources = [str(tmp_path / name) for name in ("folder", "some.tar", "some.parquet")]
    config = config_for(sources[0], index, tiny_smallcap, str(tmp_path / "run"), "output.rows_per_part=4")
    caption.run(config.model_copy(update={"images": tuple(sources)}))
    expected = {f"{number:03d}.jpg": jpeg(number) for number in range(6)}
    expected |= {f"t{number}": jpeg(20 + number) for number in range(5)}
    return config.out, expected | {f"p{number}": jpeg(40 + number) for number in range(4)}


def test_images_are_read_again_from_where_the_run_found_them(
    run_of_three_kinds: tuple[str, dict[str, bytes]], tmp_path: Path
) -> None:
    run, expected = run_of_three_kinds
    out = tmp_path / "out"
    assert len(list_parts(run)) > 1
    assert export("--to", "webdataset", "--out", str(out), run=run) == f"15 samples: {out}\n"
    files = contents(out)
    assert len(files) == 3 * 15
    ids = {name: json.loads(content)["image_id"] for name, content in files.items() if name.endswith(".json")}
    assert {image_id: files[name.replace(".json", ".jpg")] for name, image_id in ids.items()} == expected
    captions = {row["image_id"]: row["caption"] for row in read_captions(run, status="ok").rows()}
    assert {image_id: files[name.replace(".json", ".txt")].decode() for name, image_id in ids.items()} == captions


def test_what_cannot_be_read_again_is_counted_and_tried_the_next_time(
    run_of_three_kinds: tuple[str, dict[str, bytes]], tmp_path: Path
) -> None:
    run, _ = run_of_three_kinds
    out = tmp_path / "out"
    (tmp_path / "folder" / "003.jpg").rename(tmp_path / "kept")
    told = export("--to", "webdataset", "--out", str(out), run=run)
    assert told.startswith(f"14 samples: {out}; without 1 image that could not be read again (1 not_found)")
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    (tmp_path / "kept").rename(tmp_path / "folder" / "003.jpg")
    assert export("--to", "webdataset", "--out", str(out), run=run) == f"15 samples: {out}\n"
    changed = [path for path in out.glob("*.tar") if path.stat().st_mtime_ns != before[path.name]]
    assert len(changed) == 1
    assert "003.jpg" in contents(out)
