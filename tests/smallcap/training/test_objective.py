import io
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from smallcap.model.checkpoint import load_checkpoint
from smallcap.training.config import OptimizerConfig
from smallcap.training.objective import (
    CrossAttentionTrainer,
    TokenBatch,
    caption_loss,
    collate,
    freeze_all_but_cross_attention,
    frozen_sha256,
    learning_rate,
)
from tests.oracles import ORACLE, ORACLES, expected_of, hidden_states_of, load_decoder


@pytest.mark.parametrize("name", ORACLES)
def test_the_loss_is_the_references(name: str) -> None:
    decoder, case = load_decoder(name), expected_of(name)["train_case"]
    hidden = hidden_states_of(name)[case["image"]][None]
    example = (case["decoder_input_ids"], case["labels"])
    loss = caption_loss(decoder, hidden, *collate([example], pad_token_id=0))
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    longer = (case["decoder_input_ids"] * 2, [-100] * (2 * len(case["labels"])))
    padded = caption_loss(decoder, hidden.expand(2, -1, -1), *collate([example, longer], pad_token_id=0))
    assert padded.item() == pytest.approx(case["loss"], rel=1e-5)  # padding adds nothing


def test_only_cross_attention_learns_and_its_loss_falls() -> None:
    model = load_checkpoint(str(ORACLE / "gpt2_r4"))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trained = freeze_all_but_cross_attention(model.decoder)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    inputs, labels = collate([([1, 2, 3, 4], [-100, 3, 4, 13]), ([5, 6, 7], [-100, 7, 13])], pad_token_id=0)
    hidden = torch.randn(2, 17, 64, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(20):
        loss = caption_loss(model.decoder, hidden, inputs, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed
    assert all("crossattention" in name for name in changed)
    assert len(changed) == len(trained)


def trainer_of(seed: int = 0, dropout: float = 0.0, dtype: str = "float32", **options: float) -> CrossAttentionTrainer:
    model = load_checkpoint(str(ORACLE / "gpt2_r4"))
    for module in model.decoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = dropout
    return CrossAttentionTrainer(model.decoder, OptimizerConfig(learning_rate=1e-2, seed=seed, **options), 10, dtype)


def batch_of(examples: Sequence[int]) -> TokenBatch:
    """Some of six examples, of captions of 1 to 6 tokens."""
    pairs = [([1, 2, *range(3, 3 + n)], [-100, *range(3, 3 + n), 13]) for n in range(1, 7)]
    hidden = torch.randn(6, 17, 64, generator=torch.Generator().manual_seed(0)).half()
    return TokenBatch(hidden[list(examples)], *collate([pairs[place] for place in examples], pad_token_id=0))


def test_accumulated_batches_are_one_batch() -> None:
    """The weights are compared by the losses of later steps: the keys' biases have no gradient but rounding errors."""
    whole, cut = trainer_of(), trainer_of()
    for step in range(5):
        together = whole.step(step, [batch_of(range(6))])
        several = cut.step(step, [batch_of([0, 1, 2, 3]), batch_of([4]), batch_of([5])])
        assert together.tokens == several.tokens == 27
        assert together.loss == pytest.approx(several.loss, rel=1e-4)


def train_share(rank: int, world_size: int, rendezvous: str, results: str) -> None:
    """One of several processes, which takes its share of each step's examples; the last one has no examples left."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=world_size)
    trainer = trainer_of()
    shares = ([0, 3, 5], [1, 2, 4]) if world_size == 2 else ([0, 1, 2, 3, 4, 5],)
    nothing = TokenBatch(torch.zeros(1, 1, 64), *collate([([0], [-100])], 0))
    losses = [trainer.step(0, [batch_of(shares[rank][:2]), batch_of(shares[rank][2:])]).loss]
    losses.append(trainer.step(1, [batch_of([1, 4]), nothing] if rank == 0 else [nothing, nothing]).loss)
    losses.append(trainer.evaluate([batch_of(shares[rank])]).loss)
    if rank == 0:
        torch.save(losses, results)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_workers_take_the_step_of_one(tmp_path: Path) -> None:
    found = {}
    for world_size in (1, 2):
        results = str(tmp_path / f"{world_size}.pt")
        arguments = (world_size, str(tmp_path / f"rendezvous-{world_size}"), results)
        torch.multiprocessing.spawn(train_share, arguments, nprocs=world_size)
        found[world_size] = torch.load(results)
    assert found[2] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_state_goes_on_exactly_and_dropout_is_the_seeds(dtype: str) -> None:
    straight, first, second = (trainer_of(dropout=0.1, dtype=dtype) for _ in range(3))
    losses = [straight.step(step, [batch_of(range(6))]).loss for step in range(6)]
    before = [first.step(step, [batch_of(range(6))]).loss for step in range(3)]
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    with torch.no_grad():
        for weight, other in zip(second.trained, first.trained, strict=True):
            weight.copy_(other)
    second.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    torch.rand(1)  # what other code draws does not matter
    after = [second.step(step, [batch_of(range(6))]).loss for step in range(3, 6)]
    assert before + after == losses
    assert losses[-1] < losses[0]
    assert all(torch.equal(weight, other) for weight, other in zip(straight.trained, second.trained, strict=True))
    assert trainer_of(seed=1, dropout=0.1, dtype=dtype).step(0, [batch_of(range(6))]).loss != losses[0]


def test_the_learning_rate_falls_to_nothing() -> None:
    options = OptimizerConfig(learning_rate=1.0)
    assert [learning_rate(step, 4, options) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    warm = OptimizerConfig(learning_rate=1.0, warmup_steps=1, schedule="constant")
    assert [learning_rate(step, 4, warm) for step in range(3)] == [0.5, 1.0, 1.0]


def test_a_changed_weight_changes_the_hash() -> None:
    model = load_checkpoint(str(ORACLE / "gpt2_r4"))
    before = frozen_sha256(model, model.decoder)
    with torch.no_grad():
        next(iter(model.decoder.cross_attention_parameters().values())).add_(1)
    assert frozen_sha256(model, model.decoder) == before
    with torch.no_grad():
        model.decoder.token_embedding[0, 0] += 1e-3
    assert frozen_sha256(model, model.decoder) != before
