"""The options of every job except training, whose options are in smallcap/training/config.py.

The job decides what depends on the machine (device, free memory) and records it next to the config.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from smallcap.generation_config import GenerationConfig
from smallcap.hub import check_writable
from smallcap.options import MODEL, POSITIONAL, POSITIONAL_FILES, URI, Config, Flag
from smallcap.retrieval_config import IndexURIs, NamedIndex, RetrievalConfig, name_indexes
from smallcap.storage import DEFAULT_CACHE_DIR

CaptionMetric = Literal["cider", "bleu", "rouge_l", "meteor", "spice"]
DecodeMode = Literal["exact", "fast"]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
JunkFilter = Literal["urls", "markup", "repeats"]
TarIds = Literal["auto", "key", "tar/key"]
AutoCount = Literal["auto"] | Annotated[int, Field(ge=1)]
AutoBatch = Literal["auto"] | Annotated[int, Field(ge=1, le=4096)]
OutputPlace = Annotated[str, URI, AfterValidator(check_writable)]


def _number(value: Any) -> Any:
    """Returns the number that a text is; pydantic itself compares a text with numbers as it is."""
    return int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 4 else value


def check_removals(removals: tuple[str, ...]) -> tuple[str, ...]:
    """Returns what is to be removed from an index.

    Raises:
        ValueError: It does not say what it names.
    """
    for removal in removals:
        kind, equals, value = removal.partition("=")
        if kind not in ("source", "image", "text") or not equals or not value:
            raise ValueError("each must be source=NAME, image=ID, text=CAPTION, image=@FILE or text=@FILE")
    return removals


def _checksum(text: str) -> str:
    """Returns the digits of a sha256, or of its beginning, in lower case."""
    digits = text.lower().removeprefix("sha256:")
    if not re.fullmatch("[0-9a-f]{12,64}", digits):
        raise ValueError("the sha256 of the weights file, or its first 12 digits or more")
    return digits


def _version(text: str) -> str:
    if not re.fullmatch("[0-9a-f]{16}([+][0-9a-f]{16})*", text):
        raise ValueError("the id of a version, 16 digits; `smallcap index list` shows it; those of several joined by +")
    return text


ModelHash = Annotated[str | None, AfterValidator(lambda text: text and _checksum(text))]
IndexId = Annotated[str | None, AfterValidator(lambda text: text and _version(text))]
ReduceFactor = Annotated[Literal[1, 2, 4, 8, 16], BeforeValidator(_number)]


class InputConfig(Config):
    """How images are named, fetched and decoded."""

    image_column: str = "image_uri"
    """Column of a list that holds an image's URI or path; in a Parquet file it may hold the image's bytes."""
    id_column: str = "image_id"
    """Column of a list that holds an image's id. Without such a column the URI is the id."""
    tar_ids: TarIds = "auto"
    """Ids of images in WebDataset tars: their `key`, or `tar/key` with the tar's path below its folder. `auto` takes
    `tar/key` only if two tars begin with the same key."""
    max_image_pixels: int = Field(100_000_000, ge=1)
    """Images with more pixels are not decoded; they become `too_large` rows."""
    decode: DecodeMode = "exact"
    """`exact` prepares images as CLIP does, to the bit; `fast` decodes a JPEG at a fraction of its size."""
    fetch_timeout_s: float = Field(30.0, gt=0, le=86_400)
    """Seconds that one request for an image may take, its body included."""
    fetch_attempts: int = Field(6, ge=1, le=100)
    """Requests for an image before it becomes a `timeout` or `unavailable` row; the waits between them grow."""
    allow_private_hosts: bool = False
    """Fetch images also from http(s) hosts whose addresses are not public: those of this machine, of private networks,
    and of a cloud's metadata. Otherwise these images become `forbidden` rows."""
    trust_lists: bool = False
    """Let lists that come from storage or the web name local paths, chained URLs (zip://…::…) and any protocol.
    Otherwise they may name object stores, hf://, http(s) and their own folder; other images become `forbidden` rows."""


class ComputeConfig(Config):
    """Where the model runs, and in what precision."""

    device: Device = "auto"
    """Device of the model. `auto` takes a GPU if Ray has one, else the CPU."""
    dtype: Dtype = "auto"
    """Precision of weights and activations. `auto` is bfloat16 on a GPU, or float16 on one that only emulates bfloat16.
    On a CPU captioning measures float32 and bfloat16, once on a machine, and takes bfloat16 if that is clearly faster.
    For building an index `auto` is float32 everywhere."""
    compile: bool = False
    """Compile the encoders with torch.compile (captioning only). Takes minutes at the start; then a GPU is faster."""
    batch_size: AutoBatch = "auto"
    """Images captioned together. `auto` is what fits into free memory, at most 64 on a CPU and 512 on a GPU."""
    num_actors: AutoCount = "auto"
    """Model actors that a job starts with. `auto` is as many as the GPUs of the cluster hold at that time, or one per
    four CPUs."""
    max_actors: int | None = Field(None, ge=1)
    """The most actors that captioning may have if the cluster grows; by default it keeps the number it starts with.
    With device `cuda` it may start before there is a GPU; the cluster's autoscaler then brings one."""
    gpus_per_actor: float = Field(1.0, ge=0.01)
    """GPUs per actor. With a fraction several actors share one GPU; each keeps to that share of its memory. Above 1 it
    must be a whole number."""
    accelerator_type: str | None = Field(None, min_length=1)
    """Type of the actors' GPUs, as Ray names it: `T4`, `L4`, `A10G`, `H100`, …; by default any. Nodes with other GPUs
    still fetch and decode."""
    load_cpus: AutoCount = "auto"
    """CPUs that fetch and decode at a time (captioning only). `auto` is all that the actors leave where they have GPUs.
    On CPUs, whose cores loading shares with the actors, it is one of four, and one at least on each node."""
    stall_timeout_s: float = Field(600.0, gt=0, le=604_800)
    """Seconds without a finished batch after which an actor is started again, and takes the batch again (captioning
    only). Its first batch may take three times as long, for it compiles."""

    @model_validator(mode="after")
    def _pool_is_a_range(self) -> Self:
        if self.max_actors is not None and self.num_actors != "auto" and self.max_actors < self.num_actors:
            raise ValueError(f"--max-actors is {self.max_actors}, but --num-actors starts with {self.num_actors}")
        if self.device == "cpu" and self.accelerator_type is not None:
            raise ValueError("--accelerator-type is of GPUs, but --device is cpu")
        return self

    @field_validator("gpus_per_actor")
    @classmethod
    def _has_whole_gpus_or_shares_one(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise ValueError("above 1 it must be a whole number: Ray gives no fraction of a second GPU")
        return gpus


class OutputConfig(Config):
    """What is written besides the captions, and in what portions."""

    rows_per_part: AutoCount = "auto"
    """The fewest rows of a Parquet part, except the last of an attempt. What is captioned before a part is full is kept
    in interim parts meanwhile. `auto` is 5,000 on a CPU, 50,000 on a GPU, and 2,000 if tars are written."""
    rows_per_row_group: int = Field(10_000, ge=1)
    """The most rows of a row group."""
    clip_score: bool = True
    """Write the cosine of image and caption. It costs a pass of the text encoder for each caption."""
    save_embeddings: bool = False
    """Write the images' embeddings as float16 to files next to the parts."""
    write: tuple[Literal["webdataset"], ...] = ()
    """What to write besides Parquet: `webdataset` makes tars of images and captions for training pipelines."""


class CaptionConfig(Config):
    """A captioning run."""

    images: Annotated[tuple[str, ...], POSITIONAL_FILES] = Field(min_length=1)
    """Folders, prefixes, globs and files: images, WebDataset tars (.tar, also compressed: .gz, .bz2, .xz), Parquet with
    image bytes, or lists of URIs (.parquet, .csv, .tsv, .jsonl, .ndjson, .json, .txt; those of text also with .gz)."""
    index: IndexURIs = ()
    """Published index; needed unless `-k` is 0. Of several, the nearest captions of all are taken; they must have one
    encoder."""
    model: Annotated[str, MODEL]
    """`demo`, a checkpoint's folder, prefix (`s3://bucket/run/model`), or Hugging Face id."""
    out: OutputPlace
    """Output folder or prefix."""
    limit: int | None = Field(None, ge=1)
    """Caption only the first N images: those of lists and folders in the order of their ids, then those of tars."""
    keep_columns: Annotated[tuple[str, ...], Flag(has_commas=True)] = ()
    """Columns of lists or Parquet files that pass through to the output: `a,b,c`. For tars: `json`, `txt`, or a field
    of the JSON."""
    score_column: str | None = None
    """Column with a text of each image, as its alt text or an old caption. It passes through to the output, and its
    cosine with the image becomes `alt_clip_score`."""
    max_error_rate: float = Field(1.0, ge=0, le=1)
    """Share of the rows that may be errors. If there are more, the exit code is 3."""
    require_index_id: IndexId = None
    """Refuse any other version of the index than this one, before anything is read."""
    require_model_hash: ModelHash = None
    """Refuse a model whose weights file has another sha256 (or beginning of one, 12 digits or more)."""
    generation: GenerationConfig = GenerationConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    input: InputConfig = InputConfig()
    output: OutputConfig = OutputConfig()
    compute: ComputeConfig = ComputeConfig()

    @model_validator(mode="after")
    def _index_is_given(self) -> Self:
        if not self.index and self.retrieval.k != 0:
            raise ValueError("an index is needed for retrieval: give --index, or -k 0 to caption without retrieval")
        if not self.index and self.retrieval.index_column is not None:
            raise ValueError("--index-column chooses among indexes: give --index")
        name_indexes(self.index, self.retrieval.index_names, self.retrieval.index_weights)
        return self

    @model_validator(mode="after")
    def _scores_can_be_compared(self) -> Self:
        if self.score_column is not None and not self.output.clip_score:
            raise ValueError("--score-column is compared with the clip score: leave --no-clip-score out")
        if self.generation.rerank and not self.output.clip_score:
            raise ValueError("--rerank ranks by the clip score: leave --no-clip-score out")
        return self

    @property
    def columns_to_keep(self) -> tuple[str, ...]:
        """The columns of the input that pass through to the output."""
        read = dict.fromkeys([self.score_column, self.retrieval.index_column])
        return (*self.keep_columns, *(name for name in read if name is not None and name not in self.keep_columns))

    @property
    def indexes(self) -> tuple[NamedIndex, ...]:
        """The indexes, with their names and weights."""
        return name_indexes(self.index, self.retrieval.index_names, self.retrieval.index_weights)


class CleaningConfig(Config):
    """Which captions enter the datastore."""

    max_tokens: int = Field(25, ge=1)
    """The most tokens that a caption may have (the paper: 25). Longer ones are dropped and counted."""
    min_words: int = Field(1, ge=1)
    """The fewest words that a caption may have, as split at white space."""
    tokenizer: str | None = "gpt2"
    """Tokenizer that counts the tokens: `gpt2`, `demo`, a folder, a URI or a hub id. `null` counts words instead."""
    drop: tuple[JunkFilter, ...] = ()
    """Junk to drop: `urls`, `markup` (HTML, entities, BBCode, markdown links), `repeats` (aaaaaaaa, hahahahahaha)."""
    blocklist: str | None = None
    """UTF-8 text file of words and phrases, one per line; lines that begin with `#` are comments. Captions that
    contain one are dropped."""

    @field_validator("drop")
    @classmethod
    def _in_one_order(cls, drop: tuple[JunkFilter, ...]) -> tuple[JunkFilter, ...]:
        return tuple(sorted(set(drop)))  # the same filters are the same options, however they were listed


class RecallConfig(Config):
    """How well the built index must agree with exact search, and how that is measured."""

    target: Annotated[float | None, Flag(("--recall-target",))] = Field(None, gt=0, le=1)
    """Recall@4 against exact search that the lower end of its 95% interval must reach; nprobe is chosen for it. By
    default 0.99, or the target of the index that is added to."""
    accept: Annotated[bool, Flag(("--accept-recall",))] = False
    """Publish an index even if it misses the target. A removal ignores the target."""
    calibration_images: tuple[str, ...] = ()
    """Images like those to caption (files, folders, prefixes, lists); their embeddings are the queries. Without any,
    the queries are stored captions, moved away from the texts as far as images are (cosine 0.3)."""
    queries: int = Field(1024, ge=16)
    """Queries that choose nprobe; the same number of others measures the recall. A small index has fewer."""


class IndexConfig(Config):
    """An index build, an addition to an index, or a removal from it."""

    dumps: Annotated[tuple[str, ...], POSITIONAL_FILES] = ()
    """Caption dumps, as files or prefixes: CSV, TSV, JSONL, Parquet, COCO captions JSON, folders with embeddings."""
    out: OutputPlace
    """The index's folder or prefix. Versions are published below it."""
    encoder: str | None = None
    """Retrieval encoder: `demo`, `open_clip:MODEL/PRETRAINED`, or `hf:ID-PATH-OR-URI`; by default the encoder of the
    index that is added to, or of the first `--from`."""
    add: bool = False
    """Add to the current version: only new captions are embedded, and its shards and trained template are kept."""
    from_indexes: Annotated[tuple[str, ...], Flag(("--from",))] = ()
    """Published indexes whose captions are added, with their embeddings if the encoder is the same."""
    reuse: tuple[str, ...] = ()
    """Published indexes that lend their embeddings to captions of the same text."""
    remove: tuple[str, ...] = ()
    """What to remove from the current version: `source=NAME`, `image=ID` or `text=CAPTION`. `image=@FILE` and
    `text=@FILE` name a file with one per line."""
    compact: bool = False
    """Rebuild the current version from its captions and embeddings, without removed ones and with a newly trained
    template. If `index_key` is `auto`, the key stays, and its number of lists is chosen anew."""
    text_column: str = "caption"
    """Column of the dumps that holds the text."""
    image_id_column: str | None = "image"
    """Column of the dumps that holds the source image's id; ignored if a dump has none."""
    embedding_column: str | None = None
    """Column of Parquet dumps that holds the text's embedding by `encoder`. Those texts are not embedded again."""
    trust_embeddings: bool = False
    """Take the embeddings of dumps as they are. Otherwise some of their texts are embedded and compared."""
    index_key: str = "auto"
    """faiss's index key: `auto`, `Flat` (exact), `IVF,SQfp16` and `IVF,SQ8` (the number of lists is chosen), or any
    string of its index factory. Lossy codecs are ranked again by float16 vectors."""
    shards: AutoCount = "auto"
    """Number of shards. `auto` makes one per million vectors."""
    memory_budget_gb: float | None = Field(None, gt=0)
    """Memory of a node that the index may take, in GB (10^9 bytes). `auto` chooses the index key for it."""
    cache_dir: str = DEFAULT_CACHE_DIR
    """Folder on each node for copies of remote indexes and models, and for records of what has been verified."""
    cleaning: CleaningConfig = CleaningConfig()
    recall: RecallConfig = RecallConfig()
    compute: ComputeConfig = ComputeConfig()

    @model_validator(mode="after")
    def _says_one_thing_to_do(self) -> Self:
        inputs = bool(self.dumps or self.from_indexes)
        if self.remove and (inputs or self.add or self.compact):
            raise ValueError("--remove stands alone: add or compact in another call")
        if self.compact and (inputs or self.add):
            raise ValueError("--compact stands alone: add captions in another call")
        missing = []
        if not (self.remove or self.compact or inputs):
            missing.append("caption dumps are needed: give DUMPS, or --from, --remove or --compact")
        if self.encoder is None and not (self.add or self.remove or self.compact or self.from_indexes):
            missing.append("a retrieval encoder is needed: give --encoder")
        if missing:
            raise ValueError("; ".join(missing))
        return self

    @field_validator("remove")
    @classmethod
    def _names_a_kind(cls, remove: tuple[str, ...]) -> tuple[str, ...]:
        return check_removals(remove)


class EvaluateConfig(Config):
    """An evaluation of one captioning run, or of several side by side."""

    runs: Annotated[tuple[str, ...], POSITIONAL] = Field(min_length=1)
    """Output of a captioning run, or of several to compare with the first on the same images; a folder of variants
    stands for all of them."""
    references: str
    """Reference captions: COCO captions or Karpathy's splits (.json), or a table of images and captions (.csv, .tsv,
    .jsonl, .parquet)."""
    split: str | None = None
    """One of Karpathy's splits, such as `test`; by default all."""
    text_column: str = "caption"
    """Column of a table that holds the reference caption."""
    image_id_column: str = "image"
    """Column of a table that holds the image's file name or id."""
    metrics: tuple[CaptionMetric, ...] = get_args(CaptionMetric)
    """Caption metrics to compute: `a,b,c`. Those that cannot run on this machine are named and left out."""
    index: str | None = None
    """Published index. Captions that its datastore holds do not count as novel."""
    bootstrap: int = Field(1000, ge=0, le=1_000_000)
    """Draws for the 95% confidence intervals; 0 computes none."""
    seed: int = Field(0, ge=0)
    """Seed of the draws."""
    out: str | None = None
    """File for the result as JSON."""


class BenchmarkOptions(Config):
    """A measurement of one machine."""

    photos: Annotated[tuple[str, ...], POSITIONAL_FILES] = ()
    """Image files; by default the benchmark makes one."""
    images: int = Field(64, ge=1, le=1_000_000)
    """Images that the whole loop captions."""
    batch_size: int = Field(64, ge=1, le=4096)
    """Images captioned together."""
    k: Annotated[int, Flag(("-k", "--k"))] = Field(4, ge=1, le=64)
    """Retrieved captions in the prompt."""
    num_beams: int = Field(3, ge=1, le=64)
    """Beams of the search. 1 decodes greedily."""
    reduce_factor: ReduceFactor = 4
    """Factor by which the heads of the cross-attention are smaller."""
    retrieval_encoder: str = "shared"
    """`shared`, or an architecture of open_clip such as RN50x64."""
    captions: int = Field(100_000, ge=10, le=100_000_000)
    """Captions in the index."""
    device: Device = "auto"
    """Device of the model. `auto` takes a GPU if there is one, else the CPU."""
    dtype: Dtype = "auto"
    """Precision of weights and activations. `auto` is bfloat16 on a GPU, or float16 on one that only emulates bfloat16,
    and the faster of float32 and bfloat16 on a CPU."""
    compile: bool = False
    """Compile the encoders with torch.compile."""
    repeats: int = Field(3, ge=1, le=1000)
    """Runs of each stage; the fastest counts."""
    host: bool = False
    """Measure only what an actor's CPU does for a GPU, on any machine; the GPU's answers are made before."""
