"""Loads and saves SmallCap checkpoints in the reference's layout.

A checkpoint is a folder with `config.json` (model type `smallcap`, an `encoder` and a `decoder` config) and its weights
as `model.safetensors` or `pytorch_model.bin`, tensors named `encoder.*` and `decoder.*`, and usually the decoder's
tokenizer. What smallcap stores beyond the reference (the prompt's words, decoding defaults) lies under the config's key
`generation`, which the reference ignores. Nothing in a checkpoint is executed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from smallcap.decoding.beam_search import BeamSearch
from smallcap.decoding.cuda_graphs import GraphStepper
from smallcap.decoding.engine import EAGER, Generated, Stepper, generate
from smallcap.decoding.packed_linear import pack_linears
from smallcap.decoding.sampling import Sampling
from smallcap.decoding.strategy import GenerationOptions, SamplingOptions
from smallcap.decoding.text_decoder import DecoderConfig, TextDecoder
from smallcap.errors import CheckpointError, ConfigError
from smallcap.generation_config import GenerationConfig
from smallcap.machine.gpu import on_device
from smallcap.machine.precision import choose_kernels, find_device
from smallcap.model.clip_config import VisionConfig
from smallcap.model.clip_encoder import VisionEncoder
from smallcap.model.files import named_by_weights, read_checkpoint_config, resolve_folder, weights_file
from smallcap.model.gpt2 import GPT2Decoder, dump_gpt2_config, parse_gpt2_config
from smallcap.model.opt import OPTDecoder, dump_opt_config, parse_opt_config
from smallcap.model.prompt import PromptTemplate
from smallcap.model.remote import shown_place
from smallcap.model.weights import Unfilled, read_tensors
from smallcap.model.xglm import XGLM_FORMAT, XGLMDecoder
from smallcap.storage import DEFAULT_CACHE_DIR


@dataclass(frozen=True)
class DecoderKind:
    """How one kind of decoder is read, built and written, and which hub tokenizer it was published with."""

    parse_config: Callable[[dict[str, Any]], DecoderConfig]
    build: Callable[[DecoderConfig], TextDecoder]
    dump_config: Callable[[DecoderConfig], dict[str, Any]]
    hub_tokenizer: str
    prompts_start_with_bos: bool = False


DECODER_KINDS = {
    "this_gpt2": DecoderKind(parse_gpt2_config, GPT2Decoder, dump_gpt2_config, "gpt2"),
    "this_opt": DecoderKind(
        parse_opt_config, OPTDecoder, dump_opt_config, "facebook/opt-125m", prompts_start_with_bos=True
    ),
    "this_xglm": DecoderKind(XGLM_FORMAT.parse, XGLMDecoder, XGLM_FORMAT.dump, "facebook/xglm-564M"),
}

# Causal masks and position indices, which transformers 4.21 stores although the sizes decide them.
_DERIVED_TENSORS = (
    ".attn.bias",
    ".attn.masked_bias",
    ".crossattention.bias",
    ".crossattention.masked_bias",
    ".embeddings.position_ids",
    ".embed_positions.weights",  # XGLM's sinusoids
)


@dataclass(frozen=True)
class SmallCapConfig:
    """Everything that a checkpoint says besides its weights."""

    encoder: dict[str, Any]  # transformers' CLIP config: either the whole model's, or the vision tower's
    decoder: DecoderConfig
    eos_token_id: int
    pad_token_id: int
    k: int = 4
    rag: bool = True
    retrieval_encoder: str = ""
    bos_token_id: int | None = None  # prompts start with it; None for decoders that were trained without
    num_beams: int = 3
    max_new_tokens: int = 25
    length_penalty: float = 0.0
    template: PromptTemplate = field(default_factory=PromptTemplate)

    @property
    def vision(self) -> dict[str, Any]:
        """The vision tower's config."""
        vision: dict[str, Any] = self.encoder.get("vision_config") or self.encoder
        return vision


class SmallCapModel(nn.Module):
    """A frozen vision encoder and a frozen text decoder, joined by trained cross-attention.

    Attributes:
        model_id: Name and checksum of the weights, see `checkpoint_id`.
    """

    def __init__(self, config: SmallCapConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = VisionEncoder(config.vision)
        self.decoder = DECODER_KINDS[config.decoder.model_type].build(config.decoder)
        self.model_id = "untrained"
        self._graph_stepper: GraphStepper | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' precision."""
        return next(self.parameters()).dtype

    @torch.inference_mode()
    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Encodes [B, 3, S, S] normalised pixels as the [B, P, Hv] hidden states that cross-attention reads."""
        hidden_states, _ = self.encoder(pixel_values.to(self.device, self.dtype))
        return hidden_states

    def pack(self) -> None:
        """Lays the weights out for this device if possible; the model can then only be used for inference."""
        pack_linears(self.encoder)
        self.decoder.pack()

    def generation_options(self, wanted: GenerationConfig) -> GenerationOptions:
        """Returns how to decode: as `wanted` says, and as the checkpoint says for what `wanted` leaves out.

        Raises:
            ConfigError: More captions are wanted than there are beams.
        """
        defaults = self.config
        num_beams = defaults.num_beams if wanted.num_beams is None else wanted.num_beams
        if wanted.num_captions > num_beams and not wanted.do_sample:
            raise ConfigError(
                "There cannot be more captions per image than beams.",
                where="generation.num_captions",
                expected=f"at most {num_beams}",
                found=str(wanted.num_captions),
                remedy="Raise generation.num_beams, or set generation.do_sample.",
            )
        return GenerationOptions(
            num_beams=num_beams,
            max_new_tokens=defaults.max_new_tokens if wanted.max_new_tokens is None else wanted.max_new_tokens,
            length_penalty=defaults.length_penalty if wanted.length_penalty is None else wanted.length_penalty,
            eos_token_id=defaults.eos_token_id,
            pad_token_id=defaults.pad_token_id,
            no_repeat_ngram_size=wanted.no_repeat_ngram_size,
            num_captions=wanted.num_captions,
            strategy=Sampling if wanted.do_sample else BeamSearch,
            sampling=SamplingOptions(wanted.temperature, wanted.top_p, wanted.seed),
        )

    def generate(
        self,
        encoder_hidden_states: Tensor,
        prompts: Sequence[Sequence[int]],
        options: GenerationOptions | None = None,
        keys: Sequence[int] | None = None,
    ) -> list[list[Generated]]:
        """Generates captions; on a GPU in recorded steps.

        Args:
            encoder_hidden_states: [B, P, Hv].
            prompts: B lists of token ids, at least one in each.
            options: How to decode; by default as the checkpoint says.
            keys: B int64 numbers that tell images apart when sampling; by default their positions in the batch.

        Returns:
            The captions of each image, best first, without the prompts.
        """
        options = options or self.generation_options(GenerationConfig())
        with on_device(self.device):  # for what is recorded
            hidden_states = encoder_hidden_states.to(self.device, self.dtype)
            return generate(self.decoder, hidden_states, prompts, options, keys, self.stepper)

    @property
    def stepper(self) -> Stepper:
        """What runs the steps on the model's device."""
        if self.device.type != "cuda":
            return EAGER
        self._graph_stepper = self._graph_stepper or GraphStepper()
        return self._graph_stepper

    def free_memory(self) -> None:
        """Gives back the GPU memory that is kept for speed only: recorded steps, and what torch holds ready.

        Only the thread that generates may call it.
        """
        if self._graph_stepper is not None:
            self._graph_stepper.free()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def load_checkpoint(
    source: str, device: str = "cpu", dtype: str = "float32", cache_dir: str = DEFAULT_CACHE_DIR
) -> SmallCapModel:
    """Loads a SmallCap checkpoint for inference.

    Args:
        source: `demo`, a folder, a URI, or a Hugging Face id such as `Yova/SmallCap7M`.
        device: `cpu`, `cuda` or `cuda:N`. For a GPU, see `choose_kernels`, which concerns the whole process.
        dtype: `float32`, `bfloat16` or `float16`.
        cache_dir: This node's cache folder, for a copy of what a URI names.

    Returns:
        The model in eval mode, all parameters frozen.

    Raises:
        ConfigError: The device is not here.
        CheckpointError: It is missing, incomplete or of an unknown kind, or loading it would execute code.
        StorageError: The store that has it fails.
    """
    torch_device, torch_dtype = find_device(device), getattr(torch, dtype)
    folder = resolve_folder(source, "smallcap", cache_dir)
    with Unfilled():
        model = SmallCapModel(load_config(folder))
    path = weights_file(folder)
    load_weights(model, read_tensors(path), shown_place(path))
    model.model_id = named_by_weights(source, folder)
    choose_kernels(torch_dtype, torch_device)
    return model.to(device=torch_device, dtype=torch_dtype).eval().requires_grad_(False)


def load_config(folder: Path) -> SmallCapConfig:
    """Reads a checkpoint folder's `config.json`.

    Raises:
        CheckpointError: It is missing, not a SmallCap config, or of an unknown decoder kind.
    """
    values, path = read_checkpoint_config(folder), folder / "config.json"
    try:
        kind = values["decoder"]["model_type"]
        if kind not in DECODER_KINDS:
            raise CheckpointError(
                "The checkpoint has a decoder of an unknown kind.",
                where=shown_place(path),
                expected=", ".join(DECODER_KINDS),
                found=kind,
            )
        generation = values.get("generation", {})
        config = SmallCapConfig(
            encoder=values["encoder"],
            decoder=DECODER_KINDS[kind].parse_config(values["decoder"]),
            eos_token_id=values["eos_token_id"],
            pad_token_id=values["pad_token_id"],
            k=values.get("k", 4),
            rag=values.get("rag", True),
            retrieval_encoder=values.get("retrieval_encoder", ""),
            bos_token_id=values["decoder"]["bos_token_id"] if DECODER_KINDS[kind].prompts_start_with_bos else None,
        )
        return replace(config, **{**generation, "template": PromptTemplate(**generation.get("template", {}))})
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            "The checkpoint's config.json is malformed.",
            where=shown_place(path),
            found=f"{type(error).__name__}: {error}",
        ) from error


def share_vision_encoder(source: str, other: str) -> bool:
    """Says whether two checkpoints have the same vision encoder, by their files; they need not be loaded.

    Raises:
        CheckpointError: One of them cannot be found, or is malformed.
    """
    folders = [resolve_folder(one, demo_model="smallcap") for one in (source, other)]
    first, second = (VisionConfig.parse(load_config(folder).vision) for folder in folders)
    if first != second:
        return False
    tensors, others = (read_tensors(weights_file(folder)) for folder in folders)
    names = {
        name for name in (*tensors, *others) if name.startswith("encoder.") and not name.endswith(_DERIVED_TENSORS)
    }
    return all(
        name in tensors
        and name in others
        and tensors[name].dtype == others[name].dtype
        and torch.equal(tensors[name], others[name])
        for name in names
    )


def load_weights(model: SmallCapModel, tensors: dict[str, Tensor], where: str) -> None:
    """Fills a model with a checkpoint's tensors, named as in the reference's layout.

    Raises:
        CheckpointError: Tensors are missing or unknown or have wrong shapes, or the output embedding is not tied.
    """
    stored = {name: tensor for name, tensor in tensors.items() if not name.endswith(_DERIVED_TENSORS)}
    head = stored.pop("decoder.lm_head.weight", None)
    expected = _reference_names(model)
    _check_fit(expected, stored, where)
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(stored[name])
    embedding = next(tensor for name, tensor in stored.items() if name.endswith(("wte.weight", "embed_tokens.weight")))
    if head is not None and not torch.equal(head, embedding):
        raise CheckpointError(
            "The output embedding differs from the input embedding.",
            where=where,
            expected="tied embeddings, as in every published SmallCap",
        )


def _check_fit(expected: dict[str, Tensor], stored: dict[str, Tensor], where: str) -> None:
    missing = sorted(expected.keys() - stored.keys())
    unknown = sorted(stored.keys() - expected.keys())
    misfits = [n for n in sorted(expected.keys() & stored.keys()) if expected[n].shape != stored[n].shape]
    problems = [
        f"{len(names)} {what}, such as {names[0]}"
        for what, names in (("missing", missing), ("unknown", unknown))
        if names
    ]
    problems += [
        f"{name} of shape {tuple(stored[name].shape)}, not {tuple(expected[name].shape)}" for name in misfits[:3]
    ]
    if problems:
        raise CheckpointError(
            "The checkpoint's tensors do not fit its config.",
            where=where,
            expected=f"{len(expected)} tensors",
            found="; ".join(problems),
        )


def save_checkpoint(model: SmallCapModel, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes a checkpoint that the reference and `load_checkpoint` can load; the caller adds the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config, kind = model.config, DECODER_KINDS[model.config.decoder.model_type]
    bos = config.bos_token_id
    values = {
        "architectures": ["SmallCap"],
        "model_type": "smallcap",
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
        "encoder": {"model_type": "clip", **config.encoder},
        "decoder": kind.dump_config(config.decoder) | ({} if bos is None else {"bos_token_id": bos}),
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "vocab_size": config.decoder.vocab_size,
        "max_length": config.max_new_tokens,
        "k": config.k,
        "rag": config.rag,
        "retrieval_encoder": config.retrieval_encoder,
        "generation": {
            "num_beams": config.num_beams,
            "max_new_tokens": config.max_new_tokens,
            "length_penalty": config.length_penalty,
            "template": asdict(config.template),
        },
    }
    tensors = {name: t.detach().to("cpu", dtype).contiguous() for name, t in _reference_names(model).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def tokenizer_source(source: str, cache_dir: str = DEFAULT_CACHE_DIR) -> str:
    """Returns the source of a checkpoint's tokenizer: its folder, or the hub id that its decoder was trained with."""
    folder = resolve_folder(source, "smallcap", cache_dir)
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json")):
        return str(folder)
    decoder = json.loads((folder / "config.json").read_bytes())["decoder"]
    return decoder.get("_name_or_path") or DECODER_KINDS[decoder["model_type"]].hub_tokenizer


def _reference_names(model: SmallCapModel) -> dict[str, Tensor]:
    """Returns the model's tensors under the reference's names."""
    encoder: dict[str, Tensor] = {
        f"encoder.{name}": tensor for name, tensor in model.encoder.transformer.named_parameters()
    }
    return encoder | {f"decoder.{name}": tensor for name, tensor in model.decoder.named_parameters()}
