import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from smallcap.captioner import Captioner
from smallcap.model.clip_encoder import load_retrieval_encoder
from tests.index_files import PublishIndex

MakeCaptioner = Callable[..., Captioner]
TEXTS = [
    f"{number} {noun} on the {place}" for number in range(6) for noun in ("dog", "bus") for place in ("sea", "hill")
]


@pytest.fixture(scope="session")
def open_clip_specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of open_clip with random weights, as specs: a transformer, and a ResNet as the paper's encoder is."""
    import open_clip

    towers = {
        "open_clip ViT": {"image_size": 48, "layers": 2, "width": 64, "patch_size": 16},
        "open_clip ResNet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
    }
    text = {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    specs = {}
    for name, vision in towers.items():
        folder = tmp_path_factory.mktemp("open-clip")
        config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
        torch.manual_seed(0)
        torch.save(open_clip.CLIP(**config).state_dict(), folder / "open_clip_pytorch_model.bin")
        specs[name] = f"open_clip:local-dir:{folder}"
    return specs


@pytest.fixture
def encoder_spec(request: pytest.FixtureRequest, tiny_clip: Path, open_clip_specs: dict[str, str]) -> str:
    """The spec of the retrieval encoder whose name a test gives as an indirect parameter; by default `tiny_clip`'s."""
    return {"hf": f"hf:{tiny_clip}", **open_clip_specs}[getattr(request, "param", "hf")]


@pytest.fixture
def make_captioner(
    publish_index: PublishIndex, tiny_smallcap: Path, encoder_spec: str, tmp_path: Path
) -> MakeCaptioner:
    """A function that loads a tiny captioner in float32, as `make_captioner(device, **options)`, with an index."""
    encoder = load_retrieval_encoder(encoder_spec)
    images = [[f"{number}.jpg"] for number in range(len(TEXTS))]
    publish_index(f"{tmp_path}/index", encoder.encode_texts(TEXTS), TEXTS, images, shards=2, encoder=encoder.identity)
    return lambda device, **options: Captioner.from_pretrained(
        str(tiny_smallcap),
        f"{tmp_path}/index",
        device=device,
        dtype="float32",
        cache_dir=f"{tmp_path}/cache",
        **options,
    )
