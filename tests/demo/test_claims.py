"""How the claims' rows are measured and written; the trained model's own figures are in demo/claims.json."""

import json
from pathlib import Path

import numpy as np
import pytest

from demo.claim_datastores import noise_rows
from demo.claim_report import END, START, write_report
from demo.claim_rows import RandomCaptions, Row, score
from demo.claims import Claims
from demo.drawn_scenes import DrawnScenes
from demo.world import OTHER_TEST, captions_of, named_kinds, scenes_of

ROW = Row(2.0, 1.9, 2.1, 0.5, 0.47, 0.53)


@pytest.fixture(scope="module")
def scenes() -> DrawnScenes:
    drawn = scenes_of(OTHER_TEST, 60)
    return DrawnScenes(drawn, [], {str(scene.seed): captions_of(scene, 5) for scene in drawn})


def test_a_row_tells_right_captions_from_wrong_ones(scenes: DrawnScenes) -> None:
    pytest.importorskip("pycocoevalcap")
    right = [captions_of(scene, 1, salt="said")[0] for scene in scenes.scenes]
    row, shifted = score(right, scenes), score(right[1:] + right[:1], scenes)
    assert row.accuracy == 1.0 and shifted.accuracy < 0.1
    assert row.cider > 3 * shifted.cider
    assert row.cider_low < row.cider < row.cider_high
    half = score(right[:30] + [""] * 30, scenes)
    assert half.accuracy == 0.5 and half.accuracy_low < 0.45 and half.accuracy_high > 0.55


def test_noise_names_objects_and_says_nothing() -> None:
    rows = noise_rows(200)
    assert rows == noise_rows(200) and len(set(rows)) == 200
    assert all(named_kinds(caption) for _, caption in rows)
    assert not any(" next to " in caption or "in front of" in caption for _, caption in rows[:20])


def test_random_captions_do_not_depend_on_the_query() -> None:
    class Opened:
        manifest, index_id, dim = None, "id", 3

    captions = [f"caption {number}" for number in range(40)]
    found = [
        RandomCaptions(Opened(), captions).search(queries, k=4)  # type: ignore[arg-type]
        for queries in (np.zeros((5, 3), np.float32), np.ones((5, 3), np.float32))
    ]
    texts = [[[neighbour.text for neighbour in row] for row in rows] for rows in found]
    assert texts[0] == texts[1]
    assert all(len(set(row)) == 4 for row in texts[0]) and texts[0][0] != texts[0][1]


def test_rows_that_are_there_are_kept_and_of_another_number_of_scenes_are_not(tmp_path: Path) -> None:
    file = tmp_path / "claims.json"
    Claims(file, 10).row("transfer/none", lambda: ROW)
    kept = Claims(file, 10)
    kept.row("transfer/none", lambda: pytest.fail("measured again"))
    assert kept.values["transfer"]["none"] == ROW.as_json()
    assert Claims(file, 20).values == {"scenes": 20}


def test_the_report_fills_the_readme_between_its_markers(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"before\n{START}\nold\n{END}\nafter\n")
    row = ROW.as_json()
    sides = {"in_domain": row, "transfer": row}
    values = {
        "scenes": 1_000,
        "in_domain": {"none": row, "other_datastore": row, "own_datastore": row},
        "transfer": {"none": row, "training_datastore": row, "own_datastore": row},
        "k": {"1": sides, "2": sides},
        "reduce_factor": {"1": sides | {"trained_parameters": 1_000}, "4": sides | {"trained_parameters": 250}},
    }
    write_report(values, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("2.00 [1.90, 2.10] (50.0% [47.0%, 53.0%])") == 14
    assert json.loads((tmp_path / "claims.json").read_text()) == values
    assert {path.name for path in tmp_path.glob("*.png")} == {f"claims-{n}.png" for n in ("datastores", "k", "sizes")}
    write_report(values, tmp_path)
    assert (tmp_path / "README.md").read_text() == text
