"""The training step on the pretended device: the CPU's losses and weights, and few waits."""

import math

import pytest
import torch

from smallcap.training.config import OptimizerConfig
from smallcap.training.objective import CrossAttentionTrainer, StepReport, TokenBatch, collate
from tests.oracles import load_decoder
from tests.pretended_cuda.checks import check_waits
from tests.pretended_cuda.torch_cuda import pretended_cuda

STEPS = 3
# How often the host may wait in each function for one batch, and why it must.
WAITS = {
    "CrossAttentionTrainer._to_device": (3, "features, tokens and labels are uploaded"),
    "caption_loss": (2, "the labelled positions are counted"),
    "CrossAttentionTrainer.step": (
        3,
        "the loss comes back, labelled positions are counted, float16's scale is checked",
    ),
    "CrossAttentionTrainer.evaluate": (1, "the loss comes back"),
}


def trainer_on(device: str, dtype: str) -> CrossAttentionTrainer:
    """Returns a trainer without dropout, whose random numbers are a device's own."""
    decoder = load_decoder("gpt2_r4")
    for module in decoder.modules():
        for name in ("p", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return CrossAttentionTrainer(decoder.to(device), OptimizerConfig(learning_rate=1e-3), STEPS, dtype)


def train(trainer: CrossAttentionTrainer) -> list[StepReport]:
    """Takes some steps of two batches, and evaluates."""
    tokens = collate([([1, 2, 3, 4], [-100, 3, 4, 13]), ([5, 6, 7], [-100, 7, 13])], pad_token_id=0)
    features = torch.randn(2, 2, 17, 64, generator=torch.Generator().manual_seed(0)).half()
    batches = [TokenBatch(of_batch, *tokens) for of_batch in features]
    return [*(trainer.step(number, batches) for number in range(STEPS)), trainer.evaluate(batches)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_losses_and_weights_are_the_cpus(dtype: str) -> None:
    on_cpu = trainer_on("cpu", dtype)
    expected = train(on_cpu)
    with pretended_cuda() as cuda:
        trainer = trainer_on("cuda", dtype)
        found = train(trainer)
        weights = [weight.detach().cpu() for weight in trainer.trained]
        assert not cuda.hazards
    assert expected[-1].loss < expected[0].loss
    assert [report.loss for report in found] == pytest.approx([report.loss for report in expected], rel=1e-5)
    for weight, expected_weight in zip(weights, on_cpu.trained, strict=True):
        assert torch.allclose(weight, expected_weight, atol=1e-5)


def test_float16_is_scaled_and_the_host_waits_where_it_must() -> None:
    with pretended_cuda() as cuda:
        trainer = trainer_on("cuda", "float16")
        cuda.clear_events()
        reports = train(trainer)
        check_waits(cuda, WAITS, batches=2 * (STEPS + 1), place_of=lambda event: event.function)
        scale = trainer.state_dict()["scaler"]["scale"]
    assert scale < 2**16  # steps that overflow at first are left out, and the scale falls
    assert all(math.isfinite(report.loss) for report in reports)
