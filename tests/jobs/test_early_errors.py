"""What is wrong with a command is told before torch or Ray is imported, and what is refused leaves nothing behind."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.captioning.record import RunRecord, write_run_record
from jobs.training.record import TrainRecord, write_train_record
from smallcap.config import CaptionConfig
from smallcap.model.files import checkpoint_id
from smallcap.options import load_config
from smallcap.training.config import TrainConfig
from tests.caption_runs import write_images

ROOT = Path(__file__).parents[2]
SCRIPT = """
import contextlib, io, json, os, sys
sys.modules["torch"] = sys.modules["ray"] = None  # importing them is an error
from jobs.cli import app
from jobs.terminal.command_line import run_app

def files():
    return sorted(os.path.join(folder, name) for folder, folders, files in os.walk(".") for name in folders + files)

answers = []
for arguments in json.load(sys.stdin):
    before, said = files(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            run_app(app, arguments)
        except SystemExit as end:
            answers.append([end.code, said.getvalue(), sorted(set(files()) - set(before))])
print(json.dumps(answers))
"""

PLANTED = "planted-secret-0123456789"  # which no message may hold
# Words of a command in which {index}, {clip} and {model} are folders; its exit code, and what the message says.
BUILD = "build-index captions.csv --out new/index"
CAPTION = "caption images --out new/out"
WITH_ALL = f"{CAPTION} --index {{index}} --model {{model}}"
TRAIN = "train captions.csv --out new/train"
COMMANDS = {
    "a misspelt architecture": (f"{BUILD} --encoder open_clip:RN50x46/openai", 2, "or RN50x64"),
    "a misspelt tag": (f"{BUILD} --encoder open_clip:RN50x64/openia", 2, "Did you mean open_clip:RN50x64/openai?"),
    "no encoder's folder": (f"{BUILD} --encoder hf:/no/such", 1, "There is no such model folder."),
    "no spec": (f"{BUILD} --encoder RN50", 2, "For the paper's encoder write open_clip:RN50x64/openai."),
    "no column of captions": (f"{BUILD} --encoder hf:{{clip}} --text-column text", 1, "no column of captions"),
    "no dump": ("build-index none.csv --out new/index --encoder demo", 1, "none.csv"),
    "no blocklist": (f"{BUILD} --encoder hf:{{clip}} --set cleaning.blocklist=none.txt", 2, "does not exist"),
    "few images": (f"{BUILD} --encoder hf:{{clip}} --calibration-images images", 2, "too few calibration images"),
    "no index to add to": ("build-index captions.csv --add --out new/index", 1, "no published index to add to"),
    "no shards": (f"{BUILD} --encoder demo --shards 0", 2, "--shards"),
    "no key": (f"{BUILD} --encoder hf:{{clip}} --index-key banana", 2, "faiss does not know this index key"),
    "no list": (f"{BUILD} --encoder hf:{{clip}} --index-key IVF0,Flat", 2, "out of reason"),
    "no index": (f"{CAPTION} --model {{model}} --index none", 1, "no published index"),
    "no model": (f"{CAPTION} --model none/of/these --index {{index}}", 1, "There is no such model folder."),
    "another kind of model": (f"{CAPTION} --model {{clip}} --index {{index}}", 1, "not a SmallCap checkpoint"),
    "a misspelt encoder": (f"{WITH_ALL} --retrieval-encoder open_clip:RN50x46/openai", 2, "or RN50x64"),
    "no images": ("caption nothing --out new/out --model {model} --index {index}", 1, "nothing"),
    "no column of images": (
        "caption captions.csv --out new/out --model {model} --index {index} --image-column uri", 1, "uri"
    ),
    "no column to keep": (f"{WITH_ALL} --keep-columns caption", 2, "caption"),
    "another run": ("caption images --out run --model {model} -k 0 --num-beams 2", 2, "num_beams: null → 2"),
    "more partitions than shards": (f"{WITH_ALL} --partitions 9", 2, "fewer shards than the partitions"),
    "more captions than beams": (f"{WITH_ALL} --num-captions 4 --num-beams 2", 2, "--num-captions is 4"),
    "no captions to train on": (f"{TRAIN} --model {{model}} -k 0 --caption-column text", 1, "no column of captions"),
    "no model to train": (f"{TRAIN} --vision-encoder /no/clip --decoder gpt2 -k 0", 1, "no such model folder"),
    "another training": ("train captions.csv --out training --model {model} -k 0 --epochs 3", 2, "epochs: 10 → 3"),
    "no image to search with": ("search --index {index} --image none.jpg", 1, "none.jpg"),
    "no encoder to search with": ("search --index {index} --text x --encoder open_clip:RN50x46/openai", 2, "RN50x64"),
    "an index version that is gone": (
        "caption images --out gone --model {model} --index none", 1, "The run's index version is gone."
    ),
    "a version that is gone, to plan with": (
        "caption images --out gone --model {model} --index none --dry-run", 1, "The run's index version is gone."
    ),
    "no config file": ("caption images --config none.yaml", 2, "none.yaml"),
    "no run to try again": ("caption --retry-failed new/out", 2, "no run in this folder"),
    "no cluster's address": (f"{WITH_ALL} --address nowhere", 2, "not an address of a Ray cluster"),
    "no text": ("caption images --out new/out --model", 2, "requires an argument"),
    "no log's folder": (f"{WITH_ALL} --log-file new/log", 2, "The log file cannot be written."),
    "no references": ("evaluate run --references none.json", 1, "none.json"),
    "no run": ("evaluate new --references captions.csv", 2, "no run in this folder"),
    "another index version": (f"{WITH_ALL} --require-index-id {'0' * 16}", 2, "not of the version that is required"),
    "a version of no index": (
        f"{CAPTION} --model {{model}} -k 0 --require-index-id {'0' * 16}", 2, "no index is used"
    ),
    "another version than the run's": (
        f"caption images --out gone --model {{model}} --index none --require-index-id {'1' * 16}", 2, "this run began"
    ),
    "another model": (f"{WITH_ALL} --require-model-hash {'0' * 64}", 2, "not those that are required"),
    "another model to train": (f"{TRAIN} --model {{model}} -k 0 --require-model-hash {'0' * 12}", 2, "are required"),
    "a hash of no model": (
        f"{TRAIN} --vision-encoder {{clip}} --decoder gpt2 -k 0 --require-model-hash {'0' * 12}", 2, "is for --model"
    ),
    "no hash": (f"{WITH_ALL} --require-model-hash main", 2, "the sha256 of the weights file"),
    "a password in a model's place": (
        f"{CAPTION} --index {{index}} --model http://me:{PLANTED}@127.0.0.1:9/m?sig={PLANTED}", 1, "http://***@"
    ),
    "a password in an index's place": (
        f"{CAPTION} --model {{model}} --index http://me:{PLANTED}@127.0.0.1:9/i", 1, "http://***@127.0.0.1:9/i"
    ),
    "a signature in a list's place": (
        f"caption http://127.0.0.1:9/l.csv?X-Amz-Signature={PLANTED} --out new/out --model {{model}} -k 0",
        1,
        "X-Amz-Signature=***",
    ),
    "keys in a bucket's place": (
        f"{CAPTION} --index {{index}} --model s3://AKIA{'A' * 16}:{PLANTED}@bucket/model", 1, "s3://***@bucket/model"
    ),
    "a token of the environment": (f"{CAPTION} --index {{index}} --model /no/{PLANTED}", 1, "/no/***"),
    "nothing to measure": ("bench --retrieval-encoder RN50x46", 2, "or RN50x64"),
}  # fmt: skip


@pytest.fixture(scope="module")
def answers(
    index: str, tiny_clip: Path, tiny_smallcap: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[int, str, list[str]]]:
    """Exit code, message and new files of each command; all run in one process that cannot import torch and Ray."""
    folder = tmp_path_factory.mktemp("early")
    write_images(f"{folder}/images", 3)
    (folder / "captions.csv").write_text("image,caption\nimages/000.jpg,a dog\n")
    flags = {"images": ["images"], "model": str(tiny_smallcap), "out": "run", "retrieval.k": 0}
    config = load_config(CaptionConfig, flags=flags)
    write_run_record(f"{folder}/run", RunRecord.new(config, None, None, model_id="other@0"))
    retrieving = load_config(CaptionConfig, flags=flags | {"out": "gone", "index": "none", "retrieval.k": None})
    gone = RunRecord.new(retrieving, "0" * 16, None, model_id=checkpoint_id(str(tiny_smallcap)))
    gone = gone.model_copy(update={"config": gone.config | {"images": ["images"], "index": "none", "out": "gone"}})
    write_run_record(f"{folder}/gone", gone)
    training = {"sources": ["captions.csv"], "model": str(tiny_smallcap), "out": "training", "retrieval.k": 0}
    record = TrainRecord.new(load_config(TrainConfig, flags=training), None, None, start_id="other@0")
    write_train_record(f"{folder}/training", record)
    for run in ("run", "training", "gone"):
        (folder / run / ".lock").touch()  # as the run's driver left it
    lines = [
        words.format(index=index, clip=tiny_clip, model=tiny_smallcap).split() for words, _, _ in COMMANDS.values()
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(lines),
        env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(folder / "images"), "HF_HUB_OFFLINE": "1"}
        | {"HF_TOKEN": PLANTED, "AWS_EC2_METADATA_DISABLED": "true", "SMALLCAP_STORAGE_PATIENCE_S": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(COMMANDS, map(tuple, json.loads(done.stdout)), strict=True))


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_wrong_is_told_early_and_leaves_nothing(
    name: str, answers: dict[str, tuple[int, str, list[str]]]
) -> None:
    _, code, words = COMMANDS[name]
    found, message, left = answers[name]
    assert words in message, message
    assert PLANTED not in message
    assert found == code, message
    assert re.match(r"(Loading smallcap .*\n)*error: ", message)
    assert left == []
