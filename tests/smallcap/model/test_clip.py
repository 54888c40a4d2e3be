"""The towers give what transformers' CLIPModel gives with the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smallcap.errors import CheckpointError
from smallcap.model.clip import Clip, pad_right
from smallcap.model.clip_config import read_clip_config

LAYERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**LAYERS, "vocab_size": 100, "max_position_embeddings": 12, "bos_token_id": 98, "eos_token_id": 99}
VISION = {**LAYERS, "image_size": 32, "patch_size": 16}
ROWS = [[98, 5, 6, 7, 99], [98, 99], [98, *range(1, 11), 99]]


def save_clip(folder: Path, text: dict[str, Any], vision: dict[str, Any]) -> Any:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model


def their_texts(model: Any, rows: list[list[int]]) -> Tensor:
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[1] * (length - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return model.text_projection(model.text_model(input_ids=ids, attention_mask=mask).pooler_output)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_pytorch_tanh", "silu"])
@pytest.mark.parametrize("eos", [99, 2], ids=["eos", "wrong eos"])
def test_the_towers_are_those_of_transformers(tmp_path: Path, activation: str, eos: int) -> None:
    changes = {"hidden_act": activation}
    theirs = save_clip(tmp_path, TEXT | changes | {"eos_token_id": eos}, VISION | changes)
    ours = Clip.load(tmp_path).eval()
    pixel_values = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        expected = theirs.vision_model(pixel_values=pixel_values)
        hidden_states, class_token = ours.vision_model(pixel_values)
        torch.testing.assert_close(hidden_states, expected.last_hidden_state, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(class_token, expected.pooler_output, rtol=1e-5, atol=1e-5)
        features = ours.text_projection(ours.text_model(pad_right(ROWS, 12)))
        torch.testing.assert_close(features, their_texts(theirs, ROWS), rtol=1e-5, atol=1e-5)
        alone = ours.text_projection(ours.text_model(pad_right(ROWS[:1], 5)))
        torch.testing.assert_close(alone, features[:1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_weights_keep_their_precision_until_they_are_converted(tmp_path: Path, precision: str) -> None:
    dtype = getattr(torch, precision)
    theirs = save_clip(tmp_path, TEXT, VISION).to(dtype)
    theirs.save_pretrained(tmp_path)
    loaded = Clip.load(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    weights, wanted = loaded.float().state_dict(), theirs.float().state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights.items())


def test_an_old_file_of_pickled_tensors_with_positions_is_read(tmp_path: Path) -> None:
    theirs = save_clip(tmp_path, TEXT, VISION)
    (tmp_path / "model.safetensors").unlink()
    positions = {f"{tower}.embeddings.position_ids": torch.arange(12)[None] for tower in ("text_model", "vision_model")}
    torch.save(theirs.state_dict() | positions, tmp_path / "pytorch_model.bin")
    weights = Clip.load(tmp_path).state_dict()
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in weights.items())


def test_sizes_that_a_config_leaves_out_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import CLIPConfig

    old = {"text_config_dict": {"hidden_size": 768}, "text_config": {"hidden_size": 64, "vocab_size": 7}}
    for values in ({}, {"text_config": {"hidden_size": 64}, "vision_config": {"patch_size": 14}}, old):
        (tmp_path / "config.json").write_text(json.dumps(values))
        theirs = CLIPConfig(**json.loads(json.dumps(values)))
        vision, text, dim = read_clip_config(tmp_path)
        assert vars(vision).items() <= theirs.vision_config.to_dict().items()
        assert vars(text).items() <= theirs.text_config.to_dict().items()
        assert dim == theirs.projection_dim


def test_what_is_no_clip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="config cannot be read"):
        read_clip_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="config cannot be read"):
        read_clip_config(tmp_path)
    model = save_clip(tmp_path, TEXT, VISION)
    names = [name for name in model.state_dict() if not name.startswith("text_model.final")]
    (tmp_path / "model.safetensors").unlink()
    torch.save({name: model.state_dict()[name] for name in names}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"2 missing, such as text_model\.final"):
        Clip.load(tmp_path)
