"""How many rows a batch has on a GPU."""

import torch

from smallcap.machine.shapes import fill_up, rows_on_gpu


def test_rows_are_powers_of_two() -> None:
    assert [rows_on_gpu(count) for count in (0, 1, 2, 3, 4, 5, 255, 256, 257)] == [0, 1, 2, 4, 4, 8, 256, 256, 512]


def test_a_cpu_gets_what_it_is_given() -> None:
    batch = torch.arange(3)
    assert fill_up(batch) is batch
