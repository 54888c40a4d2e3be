"""Which images had certain captions in their prompts, by each way of naming them, against a plain loop over rows."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from jobs import cli, trace
from jobs.terminal.call_options import TraceOptions
from smallcap.config import CaptionConfig
from smallcap.errors import ConfigError
from smallcap.options import load_config
from tests.caption_runs import read_rows

GOLDEN = str(Path(__file__).parents[1] / "golden" / "run_v1")


def traced(run: str, **named: Any) -> list[dict[str, Any]]:
    return list(trace.trace(load_config(TraceOptions, flags={"run": run, **named})).rows())


def expected(rows: pd.DataFrame, wanted: Any) -> list[tuple[str, list[str]]]:
    """Ids, and the texts of those neighbours that are wanted, of the images that have any."""
    held = [(row.image_id, [n["text"] for n in row.neighbours if wanted(n)]) for row in rows.itertuples()]
    return [(image_id, texts) for image_id, texts in held if texts]


def found(rows: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    return sorted((row["image_id"], [n["text"] for n in row["neighbours"]]) for row in rows)


def test_images_are_found_by_source_text_and_id(finished_run: CaptionConfig) -> None:
    run = finished_run.out
    rows = read_rows(run)
    neighbour = rows.neighbours.iloc[0][1]
    by_id = found(traced(run, caption_id=[neighbour["caption_id"]]))
    assert by_id == expected(rows, lambda n: n["caption_id"] == neighbour["caption_id"])
    assert by_id
    assert found(traced(run, text=[f"  {neighbour['text'].upper()} "])) == by_id  # as the index compares texts
    assert found(traced(run, source=["dump.csv"])) == expected(rows, lambda n: True)
    several = [n["text"] for n in rows.neighbours.iloc[3]][:2]
    assert found(traced(run, text=several)) == expected(rows, lambda n: n["text"] in several)
    assert traced(run, text=["a text that no prompt held"]) == []
    with pytest.raises(ConfigError, match=r"no such source[^$]*expected: dump.csv"):
        traced(run, source=["dump"])


def test_results_are_shown_printed_as_json_and_written(
    finished_run: CaptionConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["smallcap", finished_run.out, "--source", "dump.csv", *arguments])
        with pytest.raises(SystemExit):
            cli.main("trace")
        return capsys.readouterr().out

    rows = read_rows(finished_run.out)
    shown = command("--show", "2")
    assert "9 images had such a caption in the prompt" in shown
    assert shown.count(".jpg") == 2
    assert [row["image_id"] for row in json.loads(command("--json"))] == list(rows.image_id)
    assert "9 rows" in command("--out", str(tmp_path / "held.csv"))
    assert list(pd.read_csv(tmp_path / "held.csv").image_id) == list(rows.image_id)
    command("--out", str(tmp_path / "held.jsonl.gz"))
    assert list(pd.read_json(tmp_path / "held.jsonl.gz", lines=True).caption) == list(rows.caption)


def test_what_is_traced_must_be_named() -> None:
    assert found(traced(GOLDEN, text=["a chair"])) == [("10000001.jpg", ["a chair"])]
    with pytest.raises(ConfigError, match="give --source, --text or --caption-id"):
        load_config(TraceOptions, flags={"run": GOLDEN})
