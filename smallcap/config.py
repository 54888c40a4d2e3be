"""Every job's options, as frozen pydantic objects read from a YAML file, flags and `--set a.b=c`.

Later sources win: defaults, then `--config FILE`, then flags, then `--set`. An unknown key fails with the nearest
valid name. What follows from the machine (device, free memory) is decided by the job and recorded beside the config.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from smallcap import storage
from smallcap.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound="Config")
DecodeMode = Literal["exact", "fast"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Config(BaseModel):
    """Base of all option groups: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class GenerationConfig(Config):
    """How captions are decoded; what is left out is the checkpoint's own choice, usually the paper's."""

    num_beams: int | None = Field(None, ge=1, le=64)
    """Beams of the search (the paper: 3); 1 decodes greedily."""
    max_new_tokens: int | None = Field(None, ge=1, le=512)
    """Most tokens of a caption, its eos included (the paper: 25)."""
    length_penalty: float | None = None
    """Exponent of the length that a caption's score is divided by (the paper: 0, plain sums)."""
    no_repeat_ngram_size: int = Field(0, ge=0)
    """No caption says the same n tokens twice; 0 allows it. The prompt does not count: captions may quote it."""
    num_captions: int = Field(1, ge=1, le=64)
    """Captions per image, best first; at most num_beams, unless sampled."""
    do_sample: bool = False
    """Draw captions at random instead of searching for the most likely one."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits before sampling; below 1 likely tokens become likelier."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample only from the most likely tokens that together have this probability."""
    seed: int = 0
    """Another seed draws other captions; the same one draws the same, in any batch and on any number of actors."""

    @model_validator(mode="after")
    def _sampling_is_asked_for(self) -> Self:
        if not self.do_sample and (self.temperature, self.top_p) != (1.0, 1.0):
            raise ValueError("temperature and top_p need do_sample: true")
        return self


class RetrievalConfig(Config):
    """What is retrieved for an image."""

    k: int | None = Field(None, ge=0, le=64)
    """Retrieved captions in the prompt, by default the checkpoint's (the paper: 4); 0 prompts without retrieval."""
    encoder: str | None = None
    """Retrieval encoder `open_clip:MODEL/PRETRAINED` or `hf:ID-OR-PATH`; by default the one that the index names."""
    exclude_own_captions: bool = False
    """Leave out captions whose source image has the query's image id (evaluation on the datastore's own images)."""
    cache_dir: str = "~/.cache/smallcap"
    """Where a node keeps copies of remote indexes."""


class InputConfig(Config):
    """Where images come from."""

    image_column: str = "image_uri"
    """Column of a Parquet, CSV or JSONL list that holds the image's URI or path."""
    id_column: str = "image_id"
    """Column of a list that holds the image's id; the URI is the id where there is no such column."""
    max_image_pixels: int = Field(100_000_000, ge=1)
    """Images with more pixels become `too_large` rows without being decoded."""
    decode: DecodeMode = "exact"
    """`exact` gives the encoders CLIP's own preprocessing to the bit; `fast` decodes JPEG at a fraction of its size."""


class ComputeConfig(Config):
    """Where and in what precision the model runs."""

    device: str = "auto"
    """`auto` (a GPU where Ray has one, else CPU), `cpu`, or `cuda`."""
    dtype: Dtype = "auto"
    """Precision of weights and activations. `auto` is bfloat16 on a GPU. On a CPU it is float32 when an index is built;
    captioning measures, and takes bfloat16 where that is clearly faster."""
    compile: bool = False
    """Compile the encoders with torch.compile (captioning only): minutes at the start, then faster on a GPU."""
    batch_size: int | Literal["auto"] = "auto"
    """Images captioned together; `auto` is 64 on a CPU and 256 on a GPU."""
    num_actors: int | Literal["auto"] = "auto"
    """Captioner actors; `auto` is one per GPU share, or one per four CPU cores."""
    gpus_per_actor: float = Field(1.0, gt=0)
    """GPUs of one actor; a fraction lets several actors share one GPU."""


class OutputConfig(Config):
    """How results are written."""

    rows_per_part: int = Field(5000, ge=1)
    """Rows of one Parquet part, the last one excepted; what an interrupted run loses is less than this per writer."""
    rows_per_row_group: int = Field(1000, ge=1)
    """Rows of one row group."""


class CaptionConfig(Config):
    """A captioning run."""

    images: tuple[str, ...] = Field(min_length=1)
    """Folders, prefixes, image files, or lists of URIs (.parquet, .csv, .tsv, .jsonl, .txt)."""
    index: str | None = None
    """Published index; may be left out only with `retrieval.k=0`."""
    model: str
    """`demo`, a checkpoint folder, or a Hugging Face id."""
    out: str
    """Output folder or prefix."""
    limit: int | None = Field(None, ge=1)
    """Caption only the first N images in the order of their ids."""
    generation: GenerationConfig = GenerationConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    input: InputConfig = InputConfig()
    output: OutputConfig = OutputConfig()
    compute: ComputeConfig = ComputeConfig()

    @model_validator(mode="after")
    def _index_is_given(self) -> Self:
        if self.index is None and self.retrieval.k != 0:
            raise ValueError("an index is needed for retrieval: give --index, or -k 0 to caption without retrieval")
        return self


class CleaningConfig(Config):
    """Which captions enter the datastore."""

    max_tokens: int = Field(25, ge=1)
    """Longest caption in tokens of `tokenizer`, as in the paper; longer ones are dropped and counted."""
    min_words: int = Field(1, ge=1)
    """Fewest whitespace-separated words."""
    tokenizer: str | None = None
    """Decoder tokenizer that counts the tokens (`demo`, a folder or a hub id); without one, words are counted."""


class IndexConfig(Config):
    """An index build."""

    dumps: tuple[str, ...] = Field(min_length=1)
    """Caption dumps: CSV, TSV, JSONL, Parquet, or COCO captions JSON; files, folders or prefixes."""
    out: str
    """The index's folder or prefix; versions are published below it."""
    encoder: str
    """Retrieval encoder: `demo`, `open_clip:MODEL/PRETRAINED`, or `hf:ID-OR-PATH`."""
    text_column: str = "caption"
    """Column of the dumps that holds the text."""
    image_id_column: str | None = "image"
    """Column that holds the source image's id; ignored where a dump has none."""
    index_key: Literal["auto", "Flat"] = "auto"
    """faiss index key; `Flat` is exact."""
    shards: int | Literal["auto"] = "auto"
    """Number of shards; `auto` makes one per million vectors."""
    cleaning: CleaningConfig = CleaningConfig()
    compute: ComputeConfig = ComputeConfig()


def load_config(
    kind: type[ConfigT], file: str | None = None, flags: Mapping[str, Any] | None = None, sets: Sequence[str] = ()
) -> ConfigT:
    """Builds a config from a YAML file, flags and `a.b=c` settings; later ones win.

    Args:
        kind: The config class.
        file: URI of a YAML mapping.
        flags: Dotted names to values; `None` means that the flag was not given.
        sets: `a.b=c` strings; the value is read as YAML, so that `3`, `true` and `[a, b]` have their types.

    Raises:
        ConfigError: A key is unknown, a value is wrong, or the file is not a YAML mapping.
    """
    values: dict[str, Any] = _read_yaml(file) if file else {}
    for name, value in (flags or {}).items():
        if value is not None:
            _assign(values, name, value)
    for setting in sets:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError("A --set needs a name and a value.", where=setting, expected="--set group.name=value")
        _assign(values, name.strip(), yaml.safe_load(text))
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _as_config_error(kind, error, file) from error


def config_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lists what differs between two dumped configs, as `name: old → new` lines."""
    before, after = dict(_flatten(old)), dict(_flatten(new))
    names = sorted(before.keys() | after.keys())
    return [
        f"{name}: {json.dumps(before.get(name))} → {json.dumps(after.get(name))}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


def _read_yaml(file: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(storage.read_bytes(file))
    except yaml.YAMLError as error:
        raise ConfigError("The config file is not YAML.", where=file, found=str(error)) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            "The config file must hold a mapping.",
            where=file,
            expected="name: value lines",
            found=type(values).__name__,
        )
    return values


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    *groups, name = dotted.split(".")
    for group in groups:
        inner = values.setdefault(group, {})
        if not isinstance(inner, dict):
            raise ConfigError("A setting names an option inside one that is not a group.", where=dotted)
        values = inner
    values[name] = value


def _as_config_error(kind: type[Config], error: ValidationError, file: str | None) -> ConfigError:
    """Says the first problem of a pydantic report in our own words, with the nearest valid name for an unknown key."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"]) or (file or "the options")
    if problem["type"] == "extra_forbidden":
        *groups, name = [str(part) for part in problem["loc"]]
        valid = sorted(_group(kind, groups).model_fields)
        nearest = difflib.get_close_matches(name, valid, n=1)
        remedy = f"Did you mean {'.'.join([*groups, nearest[0]])}?" if nearest else ""
        return ConfigError("There is no such option.", where=where, expected=", ".join(valid), remedy=remedy)
    if problem["type"] == "missing":
        return ConfigError("An option is missing.", where=where, remedy=f"Give --{where.replace('_', '-')}.")
    return ConfigError(
        "An option's value is wrong.", where=where, expected=problem["msg"], found=repr(problem["input"])
    )


def _group(kind: type[Config], names: Sequence[str]) -> type[Config]:
    for name in names:
        annotation = kind.model_fields[name].annotation
        kind = next(a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, Config))
    return kind
