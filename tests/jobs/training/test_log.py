import json

from jobs.training.log import TrainLog, read_log_lines
from smallcap import storage


def add_steps(log: TrainLog, first: int, last: int, loss: float) -> None:
    for step in range(first, last + 1):
        log.add(step=step, epoch=1, loss=loss, tokens=10)
    log.flush()


def test_steps_that_are_done_again_stand_once(anywhere: str) -> None:
    assert read_log_lines(anywhere) == []
    add_steps(TrainLog(anywhere, 0), 1, 7, loss=1.0)
    add_steps(TrainLog(anywhere, 4), 5, 6, loss=2.0)
    lines = [json.loads(line) for line in read_log_lines(anywhere)]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in lines] == [1.0] * 4 + [2.0] * 2
    assert len(storage.list_folder(anywhere)) == 1
