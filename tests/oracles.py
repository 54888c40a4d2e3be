"""The checkpoints and outputs of the reference implementation that the tests compare with."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from smallcap.decoding.text_decoder import TextDecoder
from smallcap.model.checkpoint import DECODER_KINDS, load_checkpoint

ORACLE = Path(__file__).parent / "golden" / "oracle"
ORACLES = ["gpt2_r4", "gpt2_r1", "opt_r4", "xglm_r2"]


def load_decoder(name: str) -> TextDecoder:
    """Loads an oracle's decoder; of OPT's and XGLM's checkpoints nothing else is kept here."""
    folder = ORACLE / name
    if not (folder / "decoder.safetensors").exists():
        return load_checkpoint(str(folder)).decoder
    values = json.loads((folder / "config.json").read_text())["decoder"]
    kind = DECODER_KINDS[values["model_type"]]
    decoder = kind.build(kind.parse_config(values))
    tensors = load_file(folder / "decoder.safetensors")
    decoder.load_state_dict({key.removeprefix("decoder."): tensor for key, tensor in tensors.items()})
    return decoder.eval().requires_grad_(False)


def expected_of(name: str) -> dict[str, Any]:
    """Returns the reference's prompts, captions, scores and training case."""
    return json.loads((ORACLE / name / "expected.json").read_text())


def hidden_states_of(name: str) -> torch.Tensor:
    """Returns the reference's hidden states of the oracle's images, [images, P, H]."""
    return torch.tensor(np.load(ORACLE / name / "expected.npz")["encoder_last_hidden_state"])


def random_inputs(count: int, seed: int = 0, longest: int = 30) -> tuple[torch.Tensor, list[list[int]]]:
    """Returns hidden states of some images for the oracle `gpt2_r4`, and ragged prompts."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    prompts = [torch.randint(1, 600, (length,), generator=generator).tolist() for length in lengths]
    return torch.randn(count, 17, 64, generator=generator), prompts
