"""Every job's options, as frozen pydantic objects read from a YAML file, flags and `--set a.b=c`.

Later sources win: defaults, then `--config FILE`, then flags, then `--set`. An unknown key fails with the nearest
valid name. What follows from the machine (device, free memory) is decided by the job and recorded beside the config.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from smallcap import storage
from smallcap.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound="Config")
CaptionMetric = Literal["cider", "bleu", "rouge_l", "meteor", "spice"]
DecodeMode = Literal["exact", "fast"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
JunkFilter = Literal["urls", "markup", "repeats"]
SearchDevice = Literal["auto", "cpu", "cuda"]
TarIds = Literal["auto", "key", "tar/key"]


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
    cache_dir: str = storage.DEFAULT_CACHE_DIR
    """Where a node keeps copies of remote indexes."""
    search_device: SearchDevice = "auto"
    """`auto` searches on the GPU that captions, where the index fits beside the model, else on the CPU; or `cpu`,
    `cuda`."""
    partitions: int = Field(1, ge=1)
    """Actors that share an index too large for one machine, each with a part of its shards; 1 lets every captioner map
    the whole index."""

    @model_validator(mode="after")
    def _partitions_search_on_cpus(self) -> Self:
        if self.partitions > 1 and self.search_device == "cuda":
            raise ValueError("partitions are searched on CPUs: leave search_device at auto, or partitions at 1")
        return self


class InputConfig(Config):
    """Where images come from."""

    image_column: str = "image_uri"
    """Column of a list that holds the image's URI or path, or of a Parquet file that holds the image's bytes."""
    id_column: str = "image_id"
    """Column of a list that holds the image's id; the URI is the id where there is no such column."""
    tar_ids: TarIds = "auto"
    """Ids of images in WebDataset tars: their `key`; or `tar/key`, with the tar's path below its folder; `auto` takes
    `tar/key` only where two tars begin with the same key."""
    max_image_pixels: int = Field(100_000_000, ge=1)
    """Images with more pixels become `too_large` rows without being decoded."""
    decode: DecodeMode = "exact"
    """`exact` gives the encoders CLIP's own preprocessing to the bit; `fast` decodes JPEG at a fraction of its size."""
    fetch_timeout_s: float = Field(30.0, gt=0)
    """Most seconds of one request for an image, its body included."""
    fetch_attempts: int = Field(6, ge=1)
    """Requests for one image before it becomes a `timeout` or `unavailable` row, with growing waits in between."""


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
    """Images captioned together; `auto` is what fits into the free memory, at most 64 on a CPU and 256 on a GPU."""
    num_actors: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Model actors that a job starts with; `auto` is one per GPU share, or one per four CPU cores, of the cluster as it
    is then."""
    max_actors: int | None = Field(None, ge=1)
    """Actors that a captioning run may grow to where the cluster grows; by default those it starts with. With `device:
    cuda` it may start before there is a GPU, and the cluster's autoscaler brings one."""
    gpus_per_actor: float = Field(1.0, gt=0)
    """GPUs of one actor; a fraction lets several actors share one GPU."""

    @model_validator(mode="after")
    def _pool_is_a_range(self) -> Self:
        if self.max_actors is not None and self.num_actors != "auto" and self.max_actors < self.num_actors:
            raise ValueError(f"max_actors is {self.max_actors}, but num_actors starts with {self.num_actors}")
        return self


class OutputConfig(Config):
    """How results are written."""

    rows_per_part: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Fewest rows of a Parquet part, the last one excepted, and what an interrupted run can lose. `auto` is 5,000 on a
    CPU, 50,000 on a GPU, and 2,000 where tars are written."""
    rows_per_row_group: int = Field(10_000, ge=1)
    """Most rows of one row group."""
    clip_score: bool = True
    """Write the cosine of image and caption, which costs a pass of the text encoder for each caption."""
    save_embeddings: bool = False
    """Write the images' embeddings, too, in float16, to files beside the parts."""
    write: tuple[Literal["webdataset"], ...] = ()
    """What to write beside Parquet: `webdataset` makes tars of images and captions for training pipelines."""


class CaptionConfig(Config):
    """A captioning run."""

    images: tuple[str, ...] = Field(min_length=1)
    """Folders, prefixes, globs and files: images, WebDataset tars (.tar, .tar.gz, .tgz), Parquet with image bytes, or
    lists of URIs (.parquet, .csv, .tsv, .jsonl, .json, .txt)."""
    keep_columns: tuple[str, ...] = ()
    """Columns of the lists or Parquet files that pass through to the output; of tars `json`, `txt`, or a field of the
    json."""
    index: str | None = None
    """Published index; may be left out only with `retrieval.k=0`."""
    model: str
    """`demo`, a checkpoint folder, or a Hugging Face id."""
    out: str
    """Output folder or prefix."""
    limit: int | None = Field(None, ge=1)
    """Caption only the first N images: those of lists and folders in the order of their ids, then those of tars."""
    max_error_rate: float = Field(1.0, ge=0, le=1)
    """The job exits with status 3 when a greater share of the rows than this are errors."""
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
    tokenizer: str | None = "gpt2"
    """Decoder tokenizer that counts the tokens (`gpt2`, `demo`, a folder or a hub id); null counts words instead."""
    drop: tuple[JunkFilter, ...] = ()
    """Junk to drop: `urls`, `markup` (HTML, entities, BBCode, markdown links), `repeats` (aaaaaaaa, hahahahahaha)."""
    blocklist: str | None = None
    """UTF-8 text file of words and phrases, one a line (`#` lines are comments); captions that hold one are dropped."""

    @field_validator("drop")
    @classmethod
    def _in_one_order(cls, drop: tuple[JunkFilter, ...]) -> tuple[JunkFilter, ...]:
        return tuple(sorted(set(drop)))  # the same filters are the same options, however they were listed


class RecallConfig(Config):
    """How well the built index must agree with exact search, and how that is measured."""

    target: float | None = Field(None, gt=0, le=1)
    """Least recall@4 against exact search, at the lower end of its 95% interval; nprobe is chosen to reach it. By
    default 0.99, or what the index that is added to was built for."""
    accept: bool = False
    """Publish an index that misses the target, with the recall it has. A removal never waits for a recall."""
    calibration_images: tuple[str, ...] = ()
    """Images like those to caption (files, folders, prefixes, lists): their embeddings are the queries. Without any,
    stored captions are moved away from the texts as far as images are (cosine 0.3)."""
    queries: int = Field(1024, ge=16)
    """Queries that choose nprobe; as many others report the recall. Fewer where there are not so many."""


class IndexConfig(Config):
    """An index build, an addition to an index, or a removal from it."""

    dumps: tuple[str, ...] = ()
    """Caption dumps: CSV, TSV, JSONL, Parquet, COCO captions JSON, folders with embeddings; files or prefixes."""
    out: str
    """The index's folder or prefix; versions are published below it."""
    encoder: str | None = None
    """Retrieval encoder: `demo`, `open_clip:MODEL/PRETRAINED`, or `hf:ID-OR-PATH`; by default that of the index which
    is added to, or of the first of `from_indexes`."""
    add: bool = False
    """Add to the current version: only new captions are embedded, its shards and its trained template are kept."""
    from_indexes: tuple[str, ...] = ()
    """Published indexes whose captions, and embeddings where the encoder is the same, are taken as well."""
    reuse: tuple[str, ...] = ()
    """Published indexes that lend their embeddings to captions of the same text."""
    remove: tuple[str, ...] = ()
    """What to remove from the current version: `source=NAME`, `image=ID`, `text=CAPTION`; `image=@FILE` and
    `text=@FILE` name a file with one per line."""
    compact: bool = False
    """Rebuild the current version from its own captions and embeddings: without the removed ones, newly trained. With
    `index_key` at `auto` the key stays, and its number of lists is chosen anew."""
    text_column: str = "caption"
    """Column of the dumps that holds the text."""
    image_id_column: str | None = "image"
    """Column that holds the source image's id; ignored where a dump has none."""
    embedding_column: str | None = None
    """Column of Parquet dumps that holds the text's embedding by `encoder`; those are not embedded again."""
    trust_embeddings: bool = False
    """Take the embeddings that dumps bring without embedding some of the texts to compare."""
    index_key: str = "auto"
    """faiss's index key: `auto`, `Flat` (exact), `IVF,SQfp16` and `IVF,SQ8` (the number of lists is chosen), or any
    string of its index factory; lossy codecs are ranked again by float16 vectors."""
    shards: int | Literal["auto"] = "auto"
    """Number of shards; `auto` makes one per million vectors."""
    memory_budget_gb: float | None = Field(None, gt=0)
    """What `auto` may choose an index key for: GB (10^9 bytes) of memory that a node can give to the index."""
    cache_dir: str = storage.DEFAULT_CACHE_DIR
    """Where a node keeps copies of remote indexes, and remembers what it has verified."""
    cleaning: CleaningConfig = CleaningConfig()
    recall: RecallConfig = RecallConfig()
    compute: ComputeConfig = ComputeConfig()

    @model_validator(mode="after")
    def _says_one_thing_to_do(self) -> Self:
        inputs = bool(self.dumps or self.from_indexes)
        if self.remove and (inputs or self.add or self.compact):
            raise ValueError("remove alone: what is to be added or compacted comes in another call")
        if self.compact and (inputs or self.add):
            raise ValueError("compact alone: what is to be added comes in another call")
        if not (self.remove or self.compact or inputs):
            raise ValueError("give caption dumps, or --from, --remove or --compact")
        if self.encoder is None and not (self.add or self.remove or self.compact or self.from_indexes):
            raise ValueError("a retrieval encoder is needed: give --encoder")
        return self

    @field_validator("remove")
    @classmethod
    def _names_a_kind(cls, remove: tuple[str, ...]) -> tuple[str, ...]:
        for removal in remove:
            kind, equals, value = removal.partition("=")
            if kind not in ("source", "image", "text") or not equals or not value:
                raise ValueError("each must be source=NAME, image=ID, text=CAPTION, image=@FILE or text=@FILE")
        return remove


class EvaluateConfig(Config):
    """An evaluation of one captioning run, or of two side by side."""

    runs: tuple[str, ...] = Field(min_length=1, max_length=2)
    """Output folders or prefixes of captioning runs."""
    references: str
    """Reference captions: COCO captions or Karpathy's splits (.json), or a table of images and captions (.csv, .tsv,
    .jsonl, .parquet)."""
    split: str | None = None
    """Of Karpathy's splits, the one to take, such as `test`; by default all."""
    text_column: str = "caption"
    """Column of a table that holds the reference caption."""
    image_id_column: str = "image"
    """Column of a table that holds the image's file name or id."""
    metrics: tuple[CaptionMetric, ...] = get_args(CaptionMetric)
    """Caption metrics to compute; those that cannot run on this machine are named and left out."""
    index: str | None = None
    """Published index; captions that its datastore holds are not counted as novel."""
    bootstrap: int = Field(1000, ge=0)
    """Draws for the 95% confidence intervals; 0 computes none."""
    seed: int = 0
    """Of the draws."""
    out: str | None = None
    """File for the result as JSON."""


def load_config(
    kind: type[ConfigT],
    file: str | None = None,
    flags: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
    base: Mapping[str, Any] | None = None,
) -> ConfigT:
    """Builds a config from a YAML file, flags and `a.b=c` settings; later ones win.

    Args:
        kind: The config class.
        file: URI of a YAML mapping.
        flags: Dotted names to values; `None` means that the flag was not given.
        sets: `a.b=c` strings; the value is read as YAML, so that `3`, `true` and `[a, b]` have their types.
        base: A dumped config that all these change, in the place of the defaults.

    Raises:
        ConfigError: A key is unknown, a value is wrong, or the file is not a YAML mapping.
    """
    values: dict[str, Any] = copy.deepcopy(dict(base)) if base else {}
    values |= _read_yaml(file) if file else {}
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


def config_difference(old: Mapping[str, Any], new: Mapping[str, Any], free: Collection[str] = ()) -> list[str]:
    """Lists what differs between two dumped configs, as `name: old → new` lines.

    Args:
        old: The one config.
        new: The other.
        free: Dotted names of options, or of groups of them, that may differ.
    """
    before, after = dict(_flatten(old)), dict(_flatten(new))
    names = sorted(before.keys() | after.keys())
    return [
        f"{name}: {json.dumps(before.get(name))} → {json.dumps(after.get(name))}"
        for name in names
        if before.get(name) != after.get(name) and not any(f"{name}.".startswith(f"{one}.") for one in free)
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
