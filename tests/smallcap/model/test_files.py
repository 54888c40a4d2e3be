"""Models are found without a network in a copy of the hub's cache, as docs/air-gapped.md says."""

import hashlib
from pathlib import Path

from tests.python_process import run_python

RESOLVE = """
from smallcap.errors import CheckpointError
from smallcap.model.clip_encoder import resolve_encoder_identity
from smallcap.model.files import resolve_folder

print(resolve_folder("Yova/SmallCap7M", demo_model="smallcap"))
print(resolve_encoder_identity("open_clip:RN50x64/openai").weights_sha256)
try:
    resolve_folder("Yova/SmallCap14M", demo_model="smallcap")
except CheckpointError as error:
    print(error.what)
"""


def add_to_cache(home: Path, hub_id: str, name: str, content: bytes) -> Path:
    """Lays a file where the hub's own client keeps it; returns the folder of the snapshot."""
    folder = home / "hub" / f"models--{hub_id.replace('/', '--')}"
    snapshot = folder / "snapshots" / hashlib.sha1(hub_id.encode()).hexdigest()
    for path, data in ((folder / "refs" / "main", snapshot.name.encode()), (snapshot / name, content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return snapshot


def test_a_copy_of_the_hubs_cache_is_enough(tmp_path: Path) -> None:
    snapshot = add_to_cache(tmp_path, "Yova/SmallCap7M", "config.json", b"{}")
    add_to_cache(tmp_path, "timm/resnet50x64_clip.openai", "open_clip_model.safetensors", b"weights")
    folder, weights, error = run_python(RESOLVE, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1").splitlines()
    assert Path(folder) == snapshot
    assert weights == hashlib.sha256(b"weights").hexdigest()
    assert error == "The model is neither a folder here nor reachable on the Hugging Face hub."
