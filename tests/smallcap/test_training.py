import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from smallcap.checkpoint import DECODER_KINDS, load_checkpoint
from smallcap.training import caption_loss, collate, freeze_all_but_cross_attention

ORACLE = Path(__file__).parents[1] / "golden" / "oracle"


@pytest.mark.parametrize("name", ["gpt2_r4", "gpt2_r1"])
def test_the_loss_is_the_references(name: str) -> None:
    model = load_checkpoint(str(ORACLE / name))
    case = json.loads((ORACLE / name / "expected.json").read_text())["train_case"]
    hidden = torch.tensor(np.load(ORACLE / name / "expected.npz")["encoder_last_hidden_state"])[case["image"]][None]
    example = (case["decoder_input_ids"], case["labels"])
    loss = caption_loss(model.decoder, hidden, *collate([example], pad_token_id=0))
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    longer = (case["decoder_input_ids"] * 2, [-100] * (2 * len(case["labels"])))
    padded = caption_loss(model.decoder, hidden.expand(2, -1, -1), *collate([example, longer], pad_token_id=0))
    assert padded.item() == pytest.approx(case["loss"], rel=1e-5)  # padding adds nothing


@pytest.mark.parametrize("name", ["opt_r4", "xglm_r2"])
def test_the_loss_of_other_decoders_is_the_references(name: str) -> None:
    values = json.loads((ORACLE / name / "config.json").read_text())["decoder"]
    kind = DECODER_KINDS[values["model_type"]]
    decoder = kind.build(kind.parse_config(values)).eval()
    tensors = load_file(ORACLE / name / "decoder.safetensors")
    decoder.load_state_dict({key.removeprefix("decoder."): tensor for key, tensor in tensors.items()})
    case = json.loads((ORACLE / name / "expected.json").read_text())["train_case"]
    hidden = torch.tensor(np.load(ORACLE / name / "expected.npz")["encoder_last_hidden_state"])[case["image"]][None]
    loss = caption_loss(decoder, hidden, *collate([(case["decoder_input_ids"], case["labels"])], pad_token_id=0))
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)


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
