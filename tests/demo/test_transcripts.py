"""Terminal recordings are made again by one command."""

from pathlib import Path

import pytest

from demo import transcripts

PAGE = """\
```console
$ echo $COLUMNS; pwd; ls demo/kinds.csv
what was printed before
$ exit 3
```
Text with a $ sign.

```console
$ echo once > note; cat note; echo to stderr >&2
```
"""


def test_outputs_of_a_page_are_new_and_name_no_folder_of_this_machine() -> None:
    recorded = transcripts.record_page(PAGE)
    first, second = transcripts.BLOCK.findall(recorded)
    assert first == "$ echo $COLUMNS; pwd; ls demo/kinds.csv\n100\n~/smallcap\ndemo/kinds.csv\n$ exit 3\n"
    assert second == "$ echo once > note; cat note; echo to stderr >&2\nonce\nto stderr\n"
    assert "\n```\nText with a $ sign.\n\n```console\n" in recorded


def test_what_shows_ctrl_c_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcripts, "_LATER_S", 0.1)
    command = "trap 'echo Stopped; exit 130' INT; echo captioned 0; echo captioned 12; while sleep 0.1; do :; done"
    assert transcripts.record_block(f"$ {command}\n^C\n", str(tmp_path)).splitlines()[1:] == [
        *("captioned 0", "captioned 12", "^C", "Stopped")
    ]
    with pytest.raises(RuntimeError, match="ended before"):
        transcripts.record_block("$ echo captioned 0\n^C\n", str(tmp_path))


def test_the_page_has_commands_and_their_outputs_in_its_blocks() -> None:
    blocks = transcripts.BLOCK.findall(transcripts.PAGE.read_text())
    assert len(blocks) >= 5
    assert all(block.startswith("$ ") for block in blocks)
    assert "caption      Caption images." in blocks[0]
