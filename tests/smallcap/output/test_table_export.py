"""A run's captions as tables: read by each format's own library, each row once, whatever interrupts an export."""

import datetime
import decimal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from smallcap.errors import ConfigError, SchemaError
from smallcap.output import table_export
from smallcap.output.reading import read_captions
from smallcap.output.table_export import TableFormat, export_table
from tests.python_process import run_python
from tests.written_runs import CAPTIONED, FAILED, write_run

KEPT = pa.table(
    {
        "licence": pa.array([1, None, 3], pa.int8()),
        "views": pa.array([2**64 - 1, 0, None], pa.uint64()),
        "score": pa.array([0.5, None, 2.0], pa.float16()),
        "taken": pa.array([10**18 + 1, None, 0], pa.timestamp("ns")),
        "seen": pa.array([10**15, 0, None], pa.timestamp("us", "Europe/Berlin")),
        "day": pa.array([datetime.date(2020, 1, 1), None, None], pa.date64()),
        "lasted": pa.array([5, None, None], pa.duration("s")),
        "hour": pa.array([datetime.time(1, 2, 3), None, None], pa.time64("us")),
        "split": pa.array(["a", "b", None]).dictionary_encode(),
        "hash": pa.array([b"ab", b"cd", None], pa.binary(2)),
        "tags": pa.array([["x"], [], None], pa.large_list(pa.large_string())),
        "nothing": pa.nulls(3),
        "where": pa.array([{"x": 1}, None, {"x": None}], pa.struct([("x", pa.uint8())])),
    }
)


@pytest.fixture(params=["iceberg", "delta", "lance"])
def kind(request: pytest.FixtureRequest) -> TableFormat:
    pytest.importorskip({"iceberg": "pyiceberg", "delta": "deltalake", "lance": "lance"}[request.param])
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A local catalogue of Iceberg's, `local`, with a warehouse in a folder; its settings are in the environment."""
    (tmp_path / "warehouse").mkdir()
    for name, value in {
        "TYPE": "sql",
        "URI": f"sqlite:///{tmp_path}/catalogue.db",
        "WAREHOUSE": f"file://{tmp_path}/warehouse",
    }.items():
        monkeypatch.setenv(f"PYICEBERG_CATALOG__LOCAL__{name}", value)
    catalog, config = pytest.importorskip("pyiceberg.catalog"), pytest.importorskip("pyiceberg.utils.config")
    monkeypatch.setattr(catalog, "_ENV_CONFIG", config.Config())  # it has read the environment when it was imported
    return "local.captions.run"


@pytest.fixture
def place(kind: TableFormat, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """Where the table is to be."""
    return str(request.getfixturevalue("catalogue")) if kind == "iceberg" else str(tmp_path / "lake" / "table")


def read(kind: TableFormat, place: str) -> pa.Table:
    """What the format's own library reads."""
    if kind == "iceberg":
        from pyiceberg.catalog import load_catalog

        return load_catalog("local").load_table("captions.run").scan().to_arrow()
    if kind == "delta":
        from deltalake import DeltaTable

        return DeltaTable(place).to_pyarrow_table()
    import lance

    return lance.dataset(place).to_table()


def commits(kind: TableFormat, place: str) -> int:
    if kind == "iceberg":
        from pyiceberg.catalog import load_catalog

        return len(load_catalog("local").load_table("captions.run").metadata.metadata_log)
    if kind == "delta":
        from deltalake import DeltaTable

        return int(DeltaTable(place).version())
    import lance

    return int(lance.dataset(place).version)


def ids(table: pa.Table) -> list[str]:
    found: list[str] = table["image_id"].to_pylist()
    return sorted(found)


def test_a_table_has_every_caption_once_however_often_it_is_exported(
    kind: TableFormat, place: str, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run")
    captions = read_captions(run, status="ok")
    assert not export_table(captions, "run", kind, place)
    table = read(kind, place)
    assert ids(table) == CAPTIONED
    assert table.column_names == captions.schema.names
    rows = {row["image_id"]: row for row in table.to_pylist()}
    null = [] if kind == "iceberg" else None  # pyiceberg 0.12 reads a null list of structs as an empty one
    assert [rows[row["image_id"]] for row in captions.rows()] == [
        row | {"alternatives": null} for row in captions.rows()
    ]
    before = commits(kind, place)
    assert export_table(captions, "run", kind, place)
    assert (commits(kind, place), ids(read(kind, place))) == (before, CAPTIONED)
    export_table(read_captions(run), "run", kind, place)  # now with those that failed
    assert ids(read(kind, place)) == sorted([*CAPTIONED, *FAILED])
    export_table(captions, "run", kind, place)
    assert ids(read(kind, place)) == CAPTIONED


KILLED = """
import os
from smallcap.output import reading
from smallcap.output.table_export import export_table

of_part = reading.Captions.of_part

def dies(self, name):
    if name.endswith(os.environ["AT"]):
        os._exit(9)
    yield from of_part(self, name)

reading.Captions.of_part = dies
export_table(reading.read_captions(os.environ["RUN"], status="ok"), "run", os.environ["KIND"], os.environ["PLACE"])
"""


@pytest.mark.parametrize("at", ["0003.parquet", pytest.param("0000.parquet", marks=pytest.mark.slow)])
def test_an_export_that_was_killed_is_repeated(kind: TableFormat, place: str, tmp_path: Path, at: str) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(subprocess.CalledProcessError) as killed:
        run_python(KILLED, RUN=run, KIND=kind, PLACE=place, AT=at)
    assert killed.value.returncode == 9, killed.value.stderr
    assert len(read(kind, place)) == 0
    export_table(read_captions(run, status="ok"), "run", kind, place)
    assert ids(read(kind, place)) == CAPTIONED


def test_a_damaged_part_leaves_the_table_as_it_was(kind: TableFormat, place: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", parts=2)
    export_table(read_captions(run, status="ok"), "run", kind, place)
    expected = ids(read(kind, place))
    write_run(tmp_path / "run")
    captions = read_captions(run, status="ok")
    part = tmp_path / "run" / "part-001-000003.parquet"
    content = part.read_bytes()
    part.write_bytes(content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :])
    with pytest.raises(SchemaError, match="part cannot be read"):
        export_table(captions, "run", kind, place)
    assert ids(read(kind, place)) == expected
    part.write_bytes(content)
    export_table(captions, "run", kind, place)
    assert ids(read(kind, place)) == CAPTIONED


def test_columns_of_every_type_are_taken(kind: TableFormat, place: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", parts=1, kept=KEPT)
    export_table(read_captions(run, status="ok"), "run", kind, place)
    table = read(kind, place).sort_by("image_id").select(KEPT.column_names)
    first, second, third = table.to_pylist()
    utc = datetime.UTC
    assert first == {
        "licence": 1,
        "views": decimal.Decimal(2**64 - 1),
        "score": 0.5,
        "taken": datetime.datetime(2001, 9, 9, 1, 46, 40),
        "seen": datetime.datetime(2001, 9, 9, 1, 46, 40, tzinfo=utc),
        "day": datetime.date(2020, 1, 1),
        "lasted": 5,
        "hour": "01:02:03.000000",
        "split": "a",
        "hash": b"ab",
        "tags": ["x"],
        "nothing": None,
        "where": {"x": 1},
    }
    assert (second["tags"], second["views"], third["where"], third["split"]) == ([], 0, {"x": None}, None)


def test_what_is_not_an_export_of_the_run_is_not_replaced(kind: TableFormat, place: str, tmp_path: Path) -> None:
    captions = read_captions(write_run(tmp_path / "run"), ["image_id", "caption"], "ok")
    export_table(captions, "other", kind, place)
    with pytest.raises(ConfigError, match="not an export of this run") as refused:
        export_table(captions, "run", kind, place)
    assert (refused.value.expected, refused.value.where) == ("nothing, or an export of run run", place)
    assert ids(read(kind, place)) == CAPTIONED


@pytest.mark.parametrize("kind", ["delta", "lance"], indirect=True)
def test_a_folder_with_something_else_is_refused(kind: TableFormat, tmp_path: Path) -> None:
    captions = read_captions(write_run(tmp_path / "run"))
    with pytest.raises(ConfigError, match="folder is not empty") as refused:
        export_table(captions, "run", kind, str(tmp_path / "run"))
    assert refused.value.found.startswith("part-001-000000.parquet")


@pytest.mark.parametrize("kind", ["delta", "lance"], indirect=True)
def test_tables_are_written_to_object_storage(kind: TableFormat, s3: str, tmp_path: Path) -> None:
    from smallcap.s3 import s3_settings

    place = f"{s3}/lake/table"
    captions = read_captions(write_run(tmp_path / "run"), status="ok")
    assert not export_table(captions, "run", kind, place)
    assert export_table(captions, "run", kind, place)
    if kind == "delta":
        from deltalake import DeltaTable

        table = DeltaTable(place, storage_options=s3_settings(place)).to_pyarrow_table()
    else:
        import lance

        table = lance.dataset(place, storage_options=s3_settings(place)).to_table()
    assert ids(table) == CAPTIONED


def test_a_catalogue_that_is_not_described_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyiceberg")
    captions = read_captions(write_run(tmp_path / "run"))
    with pytest.raises(ConfigError, match="catalogue cannot be opened") as unknown:
        export_table(captions, "run", "iceberg", "nowhere.captions.run")
    assert "PYICEBERG_CATALOG__NOWHERE__URI" in unknown.value.remedy
    with pytest.raises(ConfigError, match="names no Iceberg table"):
        export_table(captions, "run", "iceberg", "captions.run")


@pytest.mark.parametrize("kind", ["iceberg"], indirect=True)
def test_other_columns_of_an_iceberg_table_are_named(kind: TableFormat, place: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    export_table(read_captions(run, ["image_id", "caption"]), "run", kind, place)
    with pytest.raises(ConfigError, match="other columns") as refused:
        export_table(read_captions(run, ["image_id", "image_uri"]), "run", kind, place)
    assert (refused.value.expected, refused.value.found) == ("image_id, image_uri", "image_id, caption")


@pytest.mark.parametrize("missing", ["pyiceberg", "deltalake", "lance"])
def test_a_package_that_is_not_installed_is_named(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = [name for name in sys.modules if name.startswith(f"{missing}.")]
    for name in (missing, f"{missing}.exceptions", *loaded):
        monkeypatch.setitem(sys.modules, name, None)
    kind: TableFormat = {"pyiceberg": "iceberg", "deltalake": "delta", "lance": "lance"}[missing]  # type: ignore
    captions = read_captions(write_run(tmp_path / "run"))
    with pytest.raises(ConfigError) as error:
        export_table(captions, "run", kind, "local.captions.run" if kind == "iceberg" else str(tmp_path / "table"))
    assert error.value.remedy == f"pip install 'smallcap[{kind}]'"
    assert not (tmp_path / "table").exists()


@pytest.mark.parametrize("kind", ["iceberg"], indirect=True)
def test_a_data_file_ends_and_another_begins(
    kind: TableFormat, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyiceberg.catalog import load_catalog

    monkeypatch.setattr(table_export, "_FILE_ROWS", 5)
    export_table(read_captions(write_run(tmp_path / "run"), status="ok"), "run", kind, place)
    assert ids(read(kind, place)) == CAPTIONED
    assert len(load_catalog("local").load_table("captions.run").inspect.files()) == 2
