import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smallcap import storage
from smallcap.config import InputConfig
from smallcap.errors import ConfigError, ErrorCode, RowError, SchemaError, StorageError
from smallcap.images import listing
from smallcap.images import sorting as sorted_images
from smallcap.images.listing import extend_work_list, make_work_list
from smallcap.images.row_ranges import RowRanges
from smallcap.images.work_list import WorkList, load_work_list, read_fragment
from tests.input_files import make_tar, write_files

GOLDEN = Path(__file__).parents[2] / "golden" / "work_list_v1"


def sample_tar(*keys: str) -> bytes:
    """A tar of images."""
    return make_tar(*((f"{key}.jpg", b"image") for key in keys))


def make(out: Path | str, *sources: Path | str, keep: tuple[str, ...] = (), **options: object) -> WorkList:
    config = InputConfig(**options)  # type: ignore[arg-type]
    return make_work_list([str(source) for source in sources], config, str(out), keep)


def read(work: WorkList) -> dict[str, str]:
    """Ids to URIs of all fragments in order."""
    found: dict[str, str] = {}
    for fragment in work.fragments:
        batches = list(read_fragment(fragment, None, InputConfig(), work.kept_columns))
        rows = np.concatenate([batch.rows for batch in batches])
        assert rows.tolist() == list(range(len(rows)))
        assert fragment.rows in (None, len(rows))
        assert [batch.ends_fragment for batch in batches] == [False] * (len(batches) - 1) + [True]
        for batch in batches:
            found |= dict(zip(batch.image_ids, batch.image_uris, strict=True))
    return found


def write_list(file: Path, names: list[str], prefix: str = "s3://b/") -> Path:
    file.write_text("image_id,image_uri,alt\n" + "".join(f"{n},{prefix}{n}.jpg,of {n}\n" for n in names))
    return file


def names_in(out: Path) -> set[str]:
    return {path.name for path in (out / "_work").iterdir()}


def test_a_list_is_cut_into_fragments_of_256(tmp_path: Path) -> None:
    names = [f"{n:04d}" for n in range(600)]
    source = write_list(tmp_path / "list.csv", names[::-1])
    work = make(tmp_path / "out", source, keep=("alt",))
    assert [fragment.rows for fragment in work.fragments] == [256, 256, 88]
    assert [fragment.number for fragment in work.fragments] == [0, 1, 2]
    assert {(fragment.kind, fragment.uri) for fragment in work.fragments} == {
        ("uris", f"{tmp_path}/out/_work/listing-000-images-00000.parquet")
    }
    assert list(read(work)) == names
    assert (work.images, work.duplicates, work.sources) == (600, 0, (str(source),))
    (batch,) = read_fragment(work.fragments[2], RowRanges([(1, 3)]), InputConfig(), work.kept_columns)
    assert (batch.image_ids, batch.rows.tolist(), batch.ends_fragment) == (["0513", "0514"], [1, 2], False)
    assert batch.kept is not None
    assert batch.kept.to_pydict() == {"alt": ["of 0513", "of 0514"]}
    assert batch.data is None
    assert not list(read_fragment(work.fragments[2], RowRanges.span(88, 99), InputConfig(), work.kept_columns))
    assert work.fragments[-1] == work.fragments[2]
    assert [fragment.number for fragment in work.fragments[1:3]] == [1, 2]
    with pytest.raises(IndexError):
        work.fragments[3]


def test_many_images_in_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorted_images, "RUN_ROWS", 500)
    monkeypatch.setattr(sorted_images, "BATCH_ROWS", 100)
    monkeypatch.setattr(listing, "FILE_ROWS", 1024)
    names = [f"{n:05d}" for n in np.random.default_rng(0).permutation(4000)]
    lists = [write_list(tmp_path / f"{part}.csv", names[part * 500 : part * 500 + 1000]) for part in range(7)]
    work = make(tmp_path / "out", *lists)
    assert list(read(work)) == sorted(names)
    assert work.images == 4000
    assert work.duplicates == 3000
    assert not work.examples
    assert {f"listing-000-images-{n:05d}.parquet" for n in range(4)} <= names_in(tmp_path / "out")
    assert len(work.fragments) == 16


def test_what_is_in_order_is_not_spilled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("it was sorted again")

    monkeypatch.setattr(listing, "sort_images", refuse)
    photos = write_files(tmp_path / "photos", "a/1.jpg", "a.jpg", "a-b/2.jpg", "b.jpg", "a/b/3.jpg")
    names = ["a-b/2.jpg", "a.jpg", "a/1.jpg", "a/b/3.jpg", "b.jpg"]
    assert list(read(make(tmp_path / "out", photos))) == names


def test_a_huge_folder_is_listed_unsorted_and_then_sorted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smallcap.local_files._SORTED_ENTRIES", 3)
    names = [f"{n:02d}.jpg" for n in range(20)]
    assert list(read(make(tmp_path / "out", write_files(tmp_path / "photos", *names)))) == names


def test_an_id_of_two_images_is_qualified_and_an_image_named_again_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "image_id,image_uri\n7,s3://b/z.jpg\n7,s3://b/a.jpg\n8,s3://b/8.jpg\n8,s3://b/8.jpg\n"
    )
    work = make(tmp_path / "out", tmp_path / "a.csv")
    assert read(work) == {"7": "s3://b/a.jpg", "8": "s3://b/8.jpg", "s3://b/z.jpg#7": "s3://b/z.jpg"}
    assert work.duplicates == 1
    (example,) = work.examples
    assert (example.image_id, example.taken, example.left_out) == ("7", "s3://b/a.jpg", "s3://b/z.jpg")


def test_images_of_equal_names_in_two_folders_are_all_listed(tmp_path: Path) -> None:
    a, b, out = tmp_path / "a", tmp_path / "b", tmp_path / "out"
    for folder in (a, b):
        write_files(folder, "1.jpg", "2.jpg")
    (tmp_path / "list.txt").write_text(f"{b}/2.jpg\n")  # an image that the folder names as well
    sources = [str(a), str(b), str(tmp_path / "list.txt")]
    work = make(out, *sources)
    expected = {"1.jpg": f"{a}/1.jpg", "2.jpg": f"{a}/2.jpg"} | {f"{b}/{n}.jpg": f"{b}/{n}.jpg" for n in (1, 2)}
    assert read(work) == expected
    assert (work.images, work.duplicates) == (4, 1)
    write_files(b, "3.jpg")
    again = extend_work_list(sources, InputConfig(), str(out))
    assert read(again) == expected | {"3.jpg": f"{b}/3.jpg"}
    write_files(a, "3.jpg")  # which has the id of an image that is known
    again = extend_work_list(sources, InputConfig(), str(out))
    assert read(again) == expected | {"3.jpg": f"{b}/3.jpg", f"{a}/3.jpg": f"{a}/3.jpg"}
    assert len(extend_work_list(sources, InputConfig(), str(out)).fragments) == len(again.fragments)


def test_the_id_of_one_image_may_be_the_uri_of_another(tmp_path: Path) -> None:
    """As where ids are the addresses from which copies came."""
    rows = [("http://x/1", "/copy/1"), ("http://x/1", "http://x/1"), ("1", "/b/1"), ("1", "/a/1"), ("/b/1", "/c/1")]
    (tmp_path / "l.csv").write_text("image_id,image_uri\n" + "".join(f"{i},{uri}\n" for i, uri in rows))
    work = make(tmp_path / "out", tmp_path / "l.csv")
    assert read(work) == {
        "http://x/1": "/copy/1",
        "http://x/1#http://x/1": "http://x/1",
        "1": "/a/1",
        "/b/1": "/c/1",
        "/b/1#/b/1": "/b/1",
    }
    assert work.duplicates == 0
    assert len(extend_work_list([str(tmp_path / "l.csv")], InputConfig(), str(tmp_path / "out")).fragments) == 3


ROWS = st.lists(
    st.tuples(st.sampled_from(["1", "2", "/x/1", "/y/1", "/y/1#1"]), st.sampled_from(["/x/1", "/y/1", "/z"]))
)


@settings(deadline=None, max_examples=50)
@given(st.lists(ROWS.filter(bool), min_size=1, max_size=3))
def test_every_image_of_every_listing_is_there_once(listings: list[list[tuple[str, str]]]) -> None:
    with TemporaryDirectory() as folder:
        source, out = Path(folder) / "l.csv", Path(folder) / "out"
        for number, rows in enumerate(listings):
            source.write_text("image_id,image_uri\n" + "".join(f"{i},{uri}\n" for i, uri in rows))
            work = extend_work_list([str(source)], InputConfig(), str(out)) if number else make(out, source)
            if not number:
                assert work.images is not None
                assert work.images + work.duplicates == len(rows)
        found = [(batch.image_ids, batch.image_uris) for fragment in work.fragments
                 for batch in read_fragment(fragment, None, InputConfig(), work.kept_columns)]  # fmt: skip
    ids = [image_id for ids, _ in found for image_id in ids]
    assert len(set(ids)) == len(ids)
    named = {row for rows in listings for row in rows}
    for uri in {uri for _, uri in named}:
        # Two rows are one image only where one has the id that the other is given: its URI.
        times = sum(uris.count(uri) for _, uris in found)
        assert times in (len({i for i, each in named if each == uri}), len({i for i, each in named if each == uri}) - 1)
        assert times > 0


def test_tars_parquet_and_uris_together(tmp_path: Path, s3: str) -> None:
    for name in ("0.tar", "1.tar"):
        storage.write_bytes(f"{s3}/tars/{name}", sample_tar("000", "001"))
    pq.write_table(pa.table({"image": [b"1"] * 5, "alt": ["x"] * 5}), tmp_path / "hf.parquet", row_group_size=3)
    work = make(
        f"{s3}/out", f"{s3}/tars", write_list(tmp_path / "l.csv", ["b", "a"]), tmp_path / "hf.parquet", keep=("alt",)
    )
    assert [(f.kind, f.row_group, f.rows) for f in work.fragments] == [
        ("uris", 0, 2),
        ("tar", 0, None),
        ("tar", 0, None),
        ("parquet", 0, 3),
        ("parquet", 1, 2),
    ]
    assert list(read(work)) == ["a", "b", "0/000", "0/001", "1/000", "1/001", *(f"hf/{n}" for n in range(5))]
    assert work.images is None
    assert work.fragments.rows.tolist() == [2, -1, -1, 3, 2]
    assert load_work_list(f"{s3}/out") is not None


@pytest.mark.parametrize(("chosen", "ids"), [("key", ["a"]), ("tar/key", ["0/a"]), ("auto", ["a"])])
def test_ids_of_tars_as_the_config_says(tmp_path: Path, chosen: str, ids: list[str]) -> None:
    tars = write_files(tmp_path / "tars", "0.tar", content=sample_tar("a"))
    assert list(read(make(tmp_path / "out", tars, tar_ids=chosen))) == ids


@pytest.mark.parametrize(
    ("first", "more", "prefixes", "ids"),
    [
        (["0.tar"], ["1.tar"], ["", ""], ["a"]),  # as they were
        (["a.jpg"], ["0.tar", "1.tar"], ["", "0/", "1/"], ["a.jpg", "0/a", "1/a"]),
    ],
)
def test_the_first_tars_settle_their_ids(
    tmp_path: Path, first: list[str], more: list[str], prefixes: list[str], ids: list[str]
) -> None:
    make(tmp_path / "out", write_files(tmp_path / "in", *first, content=sample_tar("a")))
    write_files(tmp_path / "in", *more, content=sample_tar("a"))
    work = extend_work_list([str(tmp_path / "in")], InputConfig(), str(tmp_path / "out"))
    assert [fragment.id_prefix for fragment in work.fragments] == prefixes
    assert list(read(work)) == ids


def test_a_relist_adds_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "FILE_ROWS", 256)
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    (folder / "0.tar").write_bytes(sample_tar("t0"))
    (folder / "1.tar").write_bytes(sample_tar("t1"))
    names = [f"{n:04d}" for n in range(0, 1200, 2)]
    sources = [str(folder), str(write_list(tmp_path / "l.csv", names))]
    first = make(out, *sources, keep=("alt",))
    assert len(extend_work_list(sources, InputConfig(), str(out)).fragments) == len(first.fragments) == 5
    assert "listing-001.json" not in names_in(out)

    (folder / "2.tar").write_bytes(sample_tar("t2"))
    write_list(tmp_path / "l.csv", [*[f"{n:04d}" for n in range(1200)], "0001"])
    second = extend_work_list(sources, InputConfig(), str(out))
    assert [(f.kind, f.rows) for f in second.fragments][5:] == [
        ("uris", 256),
        ("uris", 256),
        ("uris", 88),
        ("tar", None),
    ]
    assert [f.number for f in second.fragments] == list(range(len(second.fragments)))
    assert list(read(second)) == [*names, "t0", "t1", *(f"{n:04d}" for n in range(1, 1200, 2)), "t2"]
    assert second.duplicates == 1
    assert second.kept_columns == first.kept_columns

    write_list(tmp_path / "l.csv", ["new", *names])
    third = extend_work_list(sources, InputConfig(), str(out))
    assert list(read(third)) == [*read(second), "new"]


def test_a_relist_needs_a_list_and_the_same_types(tmp_path: Path) -> None:
    source = write_list(tmp_path / "l.csv", ["a"])
    with pytest.raises(ConfigError, match="no stored list"):
        extend_work_list([str(source)], InputConfig(), str(tmp_path / "out"))
    make(tmp_path / "out", source, keep=("alt",))
    pq.write_table(pa.table({"image_uri": ["s3://b/x.jpg"], "alt": [3]}), tmp_path / "l.parquet")
    with pytest.raises(ConfigError, match="different types"):
        extend_work_list([str(tmp_path / "l.parquet")], InputConfig(), str(tmp_path / "out"))


def test_a_listing_can_be_moved_and_without_its_marker_does_not_exist(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, write_list(tmp_path / "l.csv", ["a", "b"]))
    moved = load_work_list(shutil.copytree(out, f"{tmp_path}/moved"))
    assert moved is not None
    assert list(read(moved)) == ["a", "b"]  # wherever the folder is
    (out / "_work/listing-000.json").unlink()
    (out / "_work/listing-000-images-00007.parquet").write_bytes(b"left by a longer list")
    assert load_work_list(str(out)) is None
    assert list(read(make(out, write_list(tmp_path / "l.csv", ["c"])))) == ["c"]
    assert "listing-000-images-00007.parquet" not in names_in(out)


def test_nothing_to_caption_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="There are no images"):
        make(tmp_path / "out", tmp_path / "empty")
    write_files(tmp_path / "empty", "1.psd", "2.psd", "notes")
    with pytest.raises(ConfigError, match=r"\.ndjson(.|\n)*found: 2 × \.psd, 1 × no ending"):
        make(tmp_path / "out", tmp_path / "empty")
    with pytest.raises(StorageError, match="does not exist"):
        make(tmp_path / "out", tmp_path / "none")
    assert load_work_list(str(tmp_path / "out")) is None


def test_damage_to_the_stored_list_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    work = make(out, write_list(tmp_path / "l.csv", ["a"]))
    (out / "_work/listing-000-images-00000.parquet").write_bytes(b"x")
    with pytest.raises(SchemaError, match="stored list"):
        list(read_fragment(work.fragments[0], None, InputConfig(), work.kept_columns))
    marker = json.loads((out / "_work/listing-000.json").read_text())
    (out / "_work/listing-000.json").write_text(json.dumps(marker | {"format_version": 9}))
    with pytest.raises(SchemaError, match="format version that this release cannot read"):
        load_work_list(str(out))
    (out / "_work/listing-000.json").write_text("{")
    with pytest.raises(SchemaError, match="malformed"):
        load_work_list(str(out))


def test_a_damaged_parquet_file_among_others_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"image": [b"1"]}), tmp_path / "in/a.parquet")
    (tmp_path / "in/b.parquet").write_bytes(b"damaged")
    work = make(tmp_path / "out", tmp_path / "in")
    (batch,) = read_fragment(work.fragments[1], None, InputConfig(), work.kept_columns)
    assert batch.data is not None
    assert isinstance(batch.data[0], RowError)
    assert batch.data[0].code == ErrorCode.TRUNCATED


def test_golden_format_1(tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(GOLDEN / "run", out)
    expected = json.loads((GOLDEN / "expected.json").read_text())
    work = load_work_list(str(out))
    assert work is not None
    fragments = [
        [f.number, f.kind, f.uri.replace(str(out), "OUT"), f.row_group, f.rows, f.id_prefix] for f in work.fragments
    ]
    assert fragments == expected["fragments"]
    images = []
    for fragment in work.fragments:
        if fragment.kind == "uris":
            for batch in read_fragment(fragment, None, InputConfig(), work.kept_columns):
                assert batch.kept is not None
                images += list(
                    map(list, zip(batch.image_ids, batch.image_uris, batch.kept["alt"].to_pylist(), strict=True))
                )
    assert images == expected["images"]
    assert (work.images, work.duplicates, work.listed_at) == (None, 2, expected["listed_at"])
    assert [example.left_out for example in work.examples] == ["s3://bucket/z.jpg"]
    assert work.kept_columns == pa.schema([("alt", pa.string())])


def test_format_1_is_still_written(tmp_path: Path) -> None:
    make(tmp_path / "out", write_list(tmp_path / "l.csv", ["b", "a", "a"]), keep=("alt",))
    folder, golden = tmp_path / "out/_work", GOLDEN / "run/_work"
    ours, theirs = (json.loads((place / "listing-000.json").read_text()) for place in (folder, golden))
    assert list(ours) == [*theirs, "passed_over"]  # which readers may do without
    assert ours["kept_schema"] == theirs["kept_schema"]
    added = {
        "listing-000-images-00000.parquet": [],
        "listing-000-fragments.parquet": [pa.field("qualified", pa.bool_(), nullable=False)],
    }
    for name, fields in added.items():
        before = pq.read_schema(golden / name)
        assert list(pq.read_schema(folder / name)) == [*before, *fields]  # names, types and nulls
