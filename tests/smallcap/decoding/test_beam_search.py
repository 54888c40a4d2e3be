"""The tensor bookkeeping against a readable search over lists."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from smallcap.decoding.beam_search import BeamSearch
from smallcap.decoding.strategy import GenerationOptions

EOS = 0


@dataclass
class Beam:
    tokens: tuple[int, ...]
    score: float


def reference_search(table: Tensor, num_beams: int, steps: int, length_penalty: float) -> Beam:
    """Beam search over a [steps, V, V] table of log probabilities of (step, previous token, next token)."""
    vocab = table.shape[1]
    live, finished = [Beam((), 0.0)], []
    for step in range(steps):
        candidates = [
            Beam((*beam.tokens, token), beam.score + table[step, beam.tokens[-1] if beam.tokens else 1, token].item())
            for beam, token in itertools.product(live, range(vocab))
        ]
        candidates = sorted(candidates, key=lambda beam: -beam.score)[: 2 * num_beams]
        live = []
        for rank, beam in enumerate(candidates):
            if beam.tokens[-1] == EOS:
                if rank < num_beams:
                    finished.append(Beam(beam.tokens, beam.score / len(beam.tokens) ** length_penalty))
            elif len(live) < num_beams:
                live.append(beam)
        finished = sorted(finished, key=lambda beam: -beam.score)[:num_beams]
        if len(finished) == num_beams:
            break
    else:
        finished += [Beam(beam.tokens, beam.score / steps**length_penalty) for beam in live]
    return max(finished, key=lambda beam: beam.score)


def options(num_beams: int, max_new_tokens: int, length_penalty: float = 0.0) -> GenerationOptions:
    return GenerationOptions(num_beams, max_new_tokens, length_penalty, eos_token_id=EOS, pad_token_id=0)


def tensor_search(tables: Tensor, num_beams: int, steps: int, length_penalty: float) -> list[Beam]:
    """The same over [B, steps, V, V] tables, by `BeamSearch`."""
    batch = len(tables)
    search = BeamSearch(options(num_beams, steps, length_penalty), torch.arange(batch))
    rows = torch.arange(batch)[:, None]
    previous = torch.ones(batch, 1, dtype=torch.int64)
    for step in range(steps):
        previous, _ = search.advance(tables[rows, step, previous])
    best = search.best()
    return [
        Beam(tuple(ids[:length].tolist()), score.item())
        for ids, length, score in zip(best.token_ids[:, 0], best.lengths[:, 0], best.scores[:, 0], strict=True)
    ]


@pytest.mark.parametrize("num_beams", [1, 2, 3, 5])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -0.5])
def test_equals_the_readable_search(num_beams: int, length_penalty: float) -> None:
    generator = torch.Generator().manual_seed(num_beams)
    steps, vocab = 6, 12
    tables = (2 * torch.randn(40, steps, vocab, vocab, generator=generator)).log_softmax(-1)
    found = tensor_search(tables, num_beams, steps, length_penalty)
    if (num_beams, length_penalty) == (3, 0.0):
        assert {len(beam.tokens) for beam in found} >= {1, 2, 6}  # all lengths occur
    for row, table in enumerate(tables):
        expected = reference_search(table, num_beams, steps, length_penalty)
        assert found[row].tokens == expected.tokens
        assert found[row].score == pytest.approx(expected.score, abs=1e-4)


def test_a_done_image_no_longer_changes() -> None:
    search = BeamSearch(options(1, 3), torch.zeros(1, dtype=torch.int64))
    search.advance(torch.tensor([[[9.0, 0.0, 0.0]]]))
    assert search.done.tolist() == [True]
    before = search.best()
    search.advance(torch.tensor([[[99.0, 0.0, 0.0]]]))
    after = search.best()
    assert before.token_ids[0, 0, 0] == after.token_ids[0, 0, 0] == EOS
    assert before.scores == after.scores


def test_more_beams_than_tokens_is_no_error() -> None:
    search = BeamSearch(options(3, 2), torch.zeros(1, dtype=torch.int64))
    tokens, _ = search.advance(torch.randn(1, 1, 6))
    assert tokens.shape == (1, 3)
