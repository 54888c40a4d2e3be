from pathlib import Path

import pytest

from jobs.captioning.record import (
    ImageCounts,
    Input,
    RunRecord,
    describe_passed_over,
    load_run_record,
    most_counted,
    run_lock,
    write_run_record,
)
from smallcap import storage
from smallcap.config import CaptionConfig
from smallcap.errors import ConfigError, SchemaError
from smallcap.options import load_config
from smallcap.output.part_files import PartInfo


def config(**changes: object) -> CaptionConfig:
    flags = {"images": ["photos"], "index": "index", "model": "demo", "out": "out", **changes}
    return load_config(CaptionConfig, flags=flags)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert load_run_record(str(tmp_path)) is None
    record = RunRecord.new(config(), "abcd", "demo", model_id="demo@1234")
    write_run_record(str(tmp_path), record)
    assert load_run_record(str(tmp_path)) == record
    record.check_same_run(config(), lambda: "demo@1234", "out")
    with pytest.raises(ConfigError, match="model weights: demo@1234 → demo@5678"):
        record.check_same_run(config(), lambda: "demo@5678", "out")
    with pytest.raises(ConfigError, match=r"num_captions: 1 → 2"):
        record.check_same_run(config(generation={"num_captions": 2}), lambda: "demo@1234", "out")


def test_options_that_came_after_a_run_began_have_their_defaults() -> None:
    record = RunRecord.new(config(), "abcd", "demo", model_id="demo@1234")
    generation = {name: value for name, value in record.config["generation"].items() if name != "num_captions"}
    older = record.model_copy(update={"config": record.config | {"generation": generation}})
    older.check_same_run(config(), lambda: "demo@1234", "out")
    with pytest.raises(ConfigError, match=r"num_captions: 1 → 2"):
        older.check_same_run(config(generation={"num_captions": 2}), lambda: "demo@1234", "out")


@pytest.mark.parametrize("text", ["{", "[]", '{"format_version": 1}', '{"format_version": 99}'])
def test_a_malformed_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "_run.json").write_text(text)
    with pytest.raises(SchemaError, match=r"run\.json"):
        load_run_record(str(tmp_path))


def test_the_images_of_a_run_are_the_sum_of_its_parts() -> None:
    counts = ImageCounts.of([PartInfo(ok=2), PartInfo(ok=1, errors={"truncated": 1}), PartInfo(errors={"empty": 2})])
    assert (counts.total, counts.ok, counts.error) == (6, 3, 3)
    assert counts.errors_by_code == {"empty": 2, "truncated": 1}


@pytest.mark.parametrize(
    ("finished", "asked", "done"),
    [(None, None, True), (None, 5, True), (5, 5, True), (5, 3, True), (5, 6, False), (5, None, False)],
)
def test_a_run_is_done_as_far_as_it_was_asked(finished: int | None, asked: int | None, done: bool) -> None:
    listed = Input(listed_at="2026-01-01T00:00:00+00:00", images=9, fragments=1, duplicates=0)
    record = RunRecord.new(config(), "abcd", "demo", model_id="demo@1234").model_copy(update={"input": listed})
    assert not record.is_done(asked)
    assert record.model_copy(update={"status": "complete", "limit": finished}).is_done(asked) == done


def test_a_second_driver_is_kept_out(tmp_path: Path) -> None:
    with run_lock(str(tmp_path)), pytest.raises(ConfigError, match="Another process"), run_lock(str(tmp_path)):
        pass
    with run_lock(str(tmp_path)):
        pass


def test_a_run_that_never_began_leaves_nothing(tmp_path: Path, anywhere: str) -> None:
    out = f"{anywhere}/new/out"
    with pytest.raises(ConfigError, match="wrong"), run_lock(out):
        storage.write_bytes(f"{out}/_work/list", b"")
        raise ConfigError("wrong")
    assert not storage.exists(anywhere)
    storage.write_bytes(f"{out}/mine", b"")
    with pytest.raises(ConfigError, match="wrong"), run_lock(out):
        raise ConfigError("wrong")
    assert storage.list_folder(out) == [f"{out}/mine"]
    with pytest.raises(ConfigError, match="wrong"), run_lock(out):
        write_run_record(out, RunRecord.new(config(), "abcd", "demo", model_id="demo@1234"))
        storage.write_bytes(f"{out}/_work/list", b"")
        raise ConfigError("wrong, but the run has begun")
    assert storage.exists(f"{out}/_work/list")


def test_a_lock_that_was_removed_meanwhile_is_held_by_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lock_too_late(file: object, operation: int) -> None:
        (tmp_path / ".lock").unlink()

    monkeypatch.setattr("fcntl.flock", lock_too_late)
    with pytest.raises(ConfigError, match="Another process"), run_lock(str(tmp_path)):
        pass


def test_what_was_passed_over_is_said_for_a_few_tars_and_kept_for_many() -> None:
    counts = {f"s3://b/{number}.tar": number for number in range(1, 201)}
    kept = most_counted(counts)
    assert (len(kept), kept["others"], sum(kept.values())) == (101, 5050, sum(counts.values()))
    lines = describe_passed_over(counts | {"hidden": 3})
    assert lines[0].startswith("Passed over: 3 files with the ending of an image")
    assert lines[1].startswith("Passed over: 200 files of 200.tar")
    assert lines[-1] == f"Passed over: {sum(counts.values()) - 597:,} such files of other tars."
    assert describe_passed_over({}) == []
