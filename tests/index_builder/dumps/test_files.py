import gzip
from pathlib import Path

import pytest

from index_builder.dumps.files import find_dumps, open_dump, scan_dump
from smallcap.captions.rows import CaptionColumns
from smallcap.errors import ConfigError, SchemaError, StorageError
from tests.input_files import write_files


def test_folders_globs_and_files_in_the_order_given_and_once(tmp_path: Path) -> None:
    names = ("b/2.csv", "b/1.jsonl", "b/readme.txt", "b/_SUCCESS.csv", "a/2.csv")
    write_files(tmp_path, *names, content=b"caption\n")
    found = find_dumps([f"{tmp_path}/b", f"{tmp_path}/a/*.csv", f"{tmp_path}/b/2.csv"])
    assert [dump.uri for dump in found] == [f"{tmp_path}/{name}" for name in ("b/1.jsonl", "b/2.csv", "a/2.csv")]
    assert [dump.name for dump in found] == ["b/1.jsonl", "b/2.csv", "a/2.csv"]
    assert [dump.name for dump in find_dumps([f"{tmp_path}/a"])] == ["2.csv"]  # a single file


def test_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"no caption dump(.|\n)*\.parquet"):
        find_dumps([str(tmp_path)])
    with pytest.raises(StorageError, match="does not exist"):
        find_dumps([f"{tmp_path}/absent"])


def test_text_is_read_where_it_is_named_and_how_is_noted(tmp_path: Path) -> None:
    write_files(tmp_path, "Flickr8k.token.txt", content=b"1.jpg#0\tA dog .\n")
    (tmp_path / "captions.csv.gz").write_bytes(gzip.compress(b"caption\nx\n"))
    assert [dump.name for dump in find_dumps([str(tmp_path)])] == ["captions.csv.gz"]
    dumps = find_dumps([f"{tmp_path}/Flickr8k.token.txt", str(tmp_path)])
    scans = [scan_dump((dump, CaptionColumns("caption", "image"))) for dump in dumps]
    assert [scan.note for scan in scans] == [f"{dumps[0].uri}: read as image, caption without a header.", ""]
    with open_dump(dumps[0], CaptionColumns("caption", "image")) as rows:
        assert [(row.text, row.image_id) for row in rows] == [("A dog .", "1.jpg")]


def test_scan_checks_the_columns(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text("text\na\n")
    [dump] = find_dumps([str(tmp_path)])
    with pytest.raises(SchemaError, match="no column of captions"):
        scan_dump((dump, CaptionColumns("caption")))
    scan = scan_dump((dump, CaptionColumns("text")))
    assert (scan.bytes, len(scan.sha256)) == (7, 64)
