"""A text to search with is embedded as texts of an index are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from smallcap.errors import CheckpointError
from smallcap.model.clip_encoder import load_retrieval_encoder
from smallcap.model.clip_query import embed_text

TEXTS = ["a dog", "", "a red bus on a very long street with many shops", "word " * 90, "é 中文 🐕", "<|endoftext|> a"]


@pytest.fixture
def clip(tiny_clip: Path, tmp_path: Path) -> Path:
    """A copy of the tiny CLIP."""
    return shutil.copytree(tiny_clip, tmp_path / "clip")


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def check(folder: Path) -> None:
    expected = load_retrieval_encoder(f"hf:{folder}").encode_texts(TEXTS)
    found = np.concatenate([embed_text(f"hf:{folder}", text) for text in TEXTS])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh", "silu"])
@pytest.mark.parametrize("eos", [257, 2], ids=["eos", "wrong eos"])
def test_a_text_is_embedded_as_for_an_index(clip: Path, activation: str, eos: int) -> None:
    change_config(clip, hidden_act=activation, eos_token_id=eos)
    check(clip)


@pytest.mark.parametrize("precision", ["half", "bfloat16"])
def test_weights_in_low_precision_are_computed_in_float32(clip: Path, precision: str) -> None:
    tensors = load_file(clip / "model.safetensors")
    save_file({name: getattr(tensor, precision)() for name, tensor in tensors.items()}, clip / "model.safetensors")
    check(clip)


def test_numpy_is_what_computes_where_it_can(tiny_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smallcap.model.clip_encoder.load_retrieval_encoder", lambda spec: pytest.fail("torch"))
    assert embed_text(f"hf:{tiny_clip}", "a dog").shape == (1, 16)
    assert embed_text("demo", "a dog").shape == (1, 96)


def test_other_weights_are_torchs(clip: Path) -> None:
    import torch

    torch.save(load_file(clip / "model.safetensors"), clip / "pytorch_model.bin")
    (clip / "model.safetensors").unlink()
    check(clip)


def test_damaged_weights_are_refused(clip: Path) -> None:
    tensors = load_file(clip / "model.safetensors")
    save_file({name: one for name, one in tensors.items() if "final" not in name}, clip / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"incomplete(.|\n)*final_layer_norm"):
        embed_text(f"hf:{clip}", "a dog")
    (clip / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="damaged"):
        embed_text(f"hf:{clip}", "a dog")
