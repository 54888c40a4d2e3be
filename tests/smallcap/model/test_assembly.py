"""New models from parts that transformers saved: the language model's own function, with cross-attention of its own."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    XGLMConfig,
    XGLMForCausalLM,
)

from smallcap.decoding.engine import additive_mask
from smallcap.errors import CheckpointError, ConfigError
from smallcap.model.assembly import join_frozen_models
from smallcap.model.checkpoint import load_checkpoint, save_checkpoint
from smallcap.model.files import joined_model_id

VOCABULARY = 260


WIDE = {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
OPT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64, "word_embed_proj_dim": 32}
XGLM = {"d_model": 32, "num_layers": 2, "attention_heads": 2, "ffn_dim": 64}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
KINDS = {
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=VOCABULARY, **GPT2)),
    "opt": (OPTForCausalLM, OPTConfig(**WIDE, **OPT)),
    "xglm": (XGLMForCausalLM, XGLMConfig(**WIDE, **XGLM)),
}


@pytest.fixture(params=KINDS)
def decoder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A language model's folder, with a byte-level tokenizer."""
    torch.manual_seed(0)
    kind, config = KINDS[request.param]
    model = kind(config).eval()
    for parameter in model.parameters():  # the usual initialisation would say the same of every text
        torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path / request.param
    model.save_pretrained(folder)
    vocabulary = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision tower by itself, of the width that the reference fixes for OPT and XGLM."""
    folder = tmp_path_factory.mktemp("vision")
    sizes = {"hidden_size": 768, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 12}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=16)).save_pretrained(folder)
    return folder


def test_without_cross_attention_it_is_the_language_model(decoder: Path, vision: Path, tmp_path: Path) -> None:
    model = join_frozen_models(str(vision), str(decoder), 2, retrieval_encoder="hf:clip", k=3)
    assert model.config.decoder.cross_attention_reduce_factor == 2
    assert (model.config.k, model.config.retrieval_encoder) == (3, "hf:clip")
    vocabulary = json.loads((decoder / "tokenizer.json").read_text())["model"]["vocab"]
    assert (model.config.eos_token_id, model.config.pad_token_id) == (vocabulary["."], vocabulary["!"])
    assert not any(parameter.requires_grad for parameter in model.parameters())

    save_checkpoint(model, tmp_path / "saved")
    silent = load_checkpoint(str(tmp_path / "saved")).decoder
    for name, weight in silent.named_parameters():
        if name.endswith(("crossattention.c_proj.weight", "encoder_attn.out_proj.weight")):
            weight.zero_()
    ids = torch.tensor([[5, 17, 200, 3, 90]])
    mask = additive_mask(torch.ones(1, 1, 5, 5, dtype=torch.bool).tril(), torch.float32)
    cross_kv = silent.cross_attention_kv(torch.randn(1, 5, 768))
    logits = silent.logits(silent(ids, torch.arange(5)[None], mask, cross_kv))
    language_model = KINDS[decoder.name][0].from_pretrained(decoder).eval()
    torch.testing.assert_close(logits, language_model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_new_weights_depend_on_the_seed_alone(decoder: Path, vision: Path) -> None:
    first, again, other = (join_frozen_models(str(vision), str(decoder), seed=seed).decoder for seed in (1, 1, 2))
    trained = first.cross_attention_parameters()
    assert all(torch.equal(weight, again.get_parameter(name)) for name, weight in trained.items())
    projections = [name for name, weight in trained.items() if weight.dim() == 2]
    assert not any(torch.equal(trained[name], other.get_parameter(name)) for name in projections)
    assert all(0.01 < trained[name].std() < 0.03 for name in projections)  # the reference's 0.02


@pytest.mark.parametrize("decoder", ["gpt2"], indirect=True)
def test_of_a_whole_clip_the_vision_tower_is_taken(decoder: Path, tiny_clip: Path) -> None:
    from transformers import CLIPModel

    model = join_frozen_models(str(tiny_clip), str(decoder))
    expected = CLIPModel.from_pretrained(tiny_clip).vision_model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.encoder.transformer.state_dict().items())
    assert joined_model_id(str(tiny_clip), str(decoder)) == model.model_id


@pytest.mark.parametrize("decoder", ["gpt2"], indirect=True)
def test_what_cannot_be_joined_is_refused(decoder: Path, vision: Path, tiny_clip: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="of this kind cannot be used here"):
        join_frozen_models(str(decoder), str(decoder))
    with pytest.raises(CheckpointError, match="does not hold a transformers model"):
        join_frozen_models(str(tmp_path), str(decoder))
    with pytest.raises(CheckpointError, match="no weights file"):
        (decoder / "model.safetensors").rename(decoder / "elsewhere.safetensors")
        join_frozen_models(str(vision), str(decoder))
    (decoder / "elsewhere.safetensors").rename(decoder / "model.safetensors")
    with pytest.raises(ConfigError, match="reduce factor does not divide"):
        join_frozen_models(str(vision), str(decoder), reduce_factor=3)
    with pytest.raises(ConfigError, match="no such token"):
        join_frozen_models(str(vision), str(decoder), eos_token="<end>")


@pytest.mark.parametrize("decoder", ["opt", "xglm"], indirect=True)
def test_a_narrow_vision_tower_fits_no_opt(decoder: Path, tiny_clip: Path) -> None:
    with pytest.raises(ConfigError, match="does not fit this kind of decoder"):
        join_frozen_models(str(tiny_clip), str(decoder))


@pytest.mark.parametrize("decoder", ["gpt2"], indirect=True)
def test_missing_weights_are_not_made_up(decoder: Path, vision: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(decoder / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith("h.1.mlp.c_fc.weight"))]
    save_file(tensors, decoder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="incomplete"):
        join_frozen_models(str(vision), str(decoder))
