"""Makes what `benchmarks.job` captions: photographs under many names, and a model: the demo's or one of real size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.measuring import environment
from benchmarks.tiny_models import ModelAndIndex
from smallcap import storage
from smallcap.benchmark import random_content
from smallcap.index.manifest import manifest_uri, write_pointer
from smallcap.model.checkpoint import save_checkpoint
from smallcap.model.clip import Clip
from smallcap.model.encoder_spec import resolve_encoder_identity

DEMO_INDEX = "out/demo/index"
_SUFFIXES = (".jpg", ".jpeg", ".png")
_RANDOM_CAPTIONS = 100_000  # in the index of real size


def repeat_images(source: Path, folder: Path, images: int) -> Path:
    """Fills a folder with `images` images: those of `source`, repeated under other names."""
    files = sorted(path for path in source.iterdir() if path.suffix.lower() in _SUFFIXES)
    if not files:
        raise SystemExit(f"There are no images in {source}.")
    folder.mkdir(parents=True)
    for number in range(images):
        path = files[number % len(files)]
        target = folder / f"{number:06d}{path.suffix.lower()}"
        try:
            os.link(path, target)
        except OSError:  # on another file system
            target.write_bytes(path.read_bytes())
    return folder


def demo_model(folder: Path, checkout: Path = Path()) -> ModelAndIndex:
    """Returns the demo's model with its index: that of `make demo` if a checkout has it, else one built in `folder`."""
    if (made := (checkout / DEMO_INDEX).resolve()).exists():
        return ModelAndIndex("demo", str(made))
    build = f"from jobs.demo import build_demo_index; build_demo_index({str(folder / 'index')!r})"
    env = environment() | ({"PYTHONPATH": str(checkout)} if checkout != Path() else {})
    subprocess.run([sys.executable, "-c", build], cwd=checkout, env=env, stdout=sys.stderr, check=True)
    return ModelAndIndex("demo", str(folder / "index"))


def real_size_model(folder: Path) -> ModelAndIndex:
    """Writes CLIP ViT-B/32 with GPT-2 124M, and an index of random vectors and captions; the weights are random."""
    model = random_content.build_model(4, "cpu", "float32")
    tokenizer = random_content.build_tokenizer()
    checkpoint, clip_folder, index = folder / "smallcap", folder / "clip", folder / "index"
    save_checkpoint(model, checkpoint)
    torch.manual_seed(0)
    _save_clip(random_content.build_clip(model), clip_folder)
    for holder in (checkpoint, clip_folder):
        tokenizer.save(str(holder / "tokenizer.json"))
    index.mkdir()
    identity = resolve_encoder_identity(f"hf:{clip_folder}")
    manifest = random_content.write_random_index(index, _RANDOM_CAPTIONS, identity).manifest
    storage.write_bytes(manifest_uri(str(index), manifest.index_id), manifest.to_json().encode())
    write_pointer(str(index), manifest.index_id)
    return ModelAndIndex(str(checkpoint), str(index))


def _save_clip(clip: Clip, folder: Path) -> None:
    """Writes a CLIP as transformers does."""
    folder.mkdir()
    save_file(clip.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    towers = {"vision_config": asdict(clip.vision_config), "text_config": asdict(clip.text_config)}
    config = {"model_type": "clip", "projection_dim": clip.text_projection.out_features, **towers}
    (folder / "config.json").write_text(json.dumps(config))
