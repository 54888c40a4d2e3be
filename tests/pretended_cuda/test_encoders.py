"""Encoders on the pretended device embed as on the CPU."""

from pathlib import Path

import numpy as np
import pytest
import torch

from smallcap.model.checkpoint import load_checkpoint
from smallcap.model.clip_encoder import load_retrieval_encoder
from tests.pretended_cuda.torch_cuda import pretended_cuda

TEXTS = ["a dog", "a red bus on a very long street with many shops", "x"]


@pytest.mark.parametrize("encoder_spec", ["hf", "open_clip ViT", "open_clip ResNet"], indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embeddings_are_the_cpus(encoder_spec: str, dtype: str) -> None:
    on_cpu = load_retrieval_encoder(encoder_spec, dtype=dtype)
    size = on_cpu.preprocessing.size_px
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    expected = on_cpu.encode_texts(TEXTS), on_cpu.encode_images(pixels).numpy()
    with pretended_cuda() as cuda:
        encoder = load_retrieval_encoder(encoder_spec, "cuda", dtype)
        found = encoder.encode_texts(TEXTS), encoder.encode_images(pixels.to("cuda")).cpu().numpy()
        assert not cuda.hazards
    for vectors, expected_vectors in zip(found, expected, strict=True):
        assert np.allclose(vectors, expected_vectors, atol=1e-5 if dtype == "float32" else 0.05)


def test_hidden_states_are_the_cpus(tiny_smallcap: Path) -> None:
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = load_checkpoint(str(tiny_smallcap)).encode_images(pixels)
    with pretended_cuda():
        found = load_checkpoint(str(tiny_smallcap), "cuda").encode_images(pixels)
        assert found.is_cuda
        assert torch.allclose(found.cpu(), expected, atol=1e-5)
