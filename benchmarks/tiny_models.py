"""Makes a CLIP and a SmallCap that are small enough to caption hundreds of images per second; the weights are random.

Tests use them, and benchmarks that measure the job, not the model.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from smallcap.model.files import tokenizer_folder

TINY_DIM = 16


@dataclass(frozen=True)
class ModelAndIndex:
    """A checkpoint and an index for it."""

    model: str
    index: str


def make_tiny_clip(folder: Path, seed: int, dim: int = TINY_DIM) -> Path:
    """Writes a folder of transformers' CLIPModel with random weights and a byte-level tokenizer; returns the folder.

    Its embeddings have `dim` numbers.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    vocabulary = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"<|startoftext|>": 256, "<|endoftext|>": 257}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", 256), ("<|endoftext|>", 257)]
    )
    ends = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=77, **ends).save_pretrained(folder)
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**layers, "vocab_size": 258, "max_position_embeddings": 77, "bos_token_id": 256, "eos_token_id": 257}
    vision = {**layers, "image_size": 32, "patch_size": 16}
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=dim))
    for parameter in model.parameters():  # the usual initialisation is so small that all texts look alike
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def make_tiny_smallcap(folder: Path, clip_folder: Path) -> Path:
    """Writes a checkpoint with the vision tower of a tiny CLIP, a random GPT-2, and GPT-2's tokenizer."""
    import torch
    from transformers import CLIPModel

    from smallcap.decoding.text_decoder import DecoderConfig
    from smallcap.model.checkpoint import SmallCapConfig, SmallCapModel, save_checkpoint

    clip = CLIPModel.from_pretrained(clip_folder)
    decoder = DecoderConfig(
        model_type="this_gpt2",
        vocab_size=50257,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        ffn_size=64,
        max_positions=512,
        encoder_hidden_size=32,
        cross_attention_reduce_factor=2,
        layer_norm_eps=1e-5,
        activation="gelu_new",
        dropout=0.1,
    )
    config = SmallCapConfig({"vision_config": clip.config.vision_config.to_dict()}, decoder, 13, 0, max_new_tokens=8)
    torch.manual_seed(0)
    model = SmallCapModel(config)
    for parameter in model.decoder.parameters():  # with GPT-2's initialisation every image would get the same caption
        torch.nn.init.normal_(parameter, std=0.3)
    model.encoder.transformer.load_state_dict(clip.vision_model.state_dict())
    save_checkpoint(model, folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tokenizer_folder("gpt2") / name, folder)
    return folder
