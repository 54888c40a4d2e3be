import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from smallcap.errors import CheckpointError
from smallcap.images.decode import Preprocessing
from smallcap.model.clip_encoder import VisionEncoder, load_retrieval_encoder, normalise_pixels
from smallcap.model.encoder_spec import load_preprocessing, resolve_encoder_identity

TEXTS = ["a dog", "a red bus on a very long street with many shops", "x"]


@pytest.fixture(scope="module")
def tiny_open_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An open_clip folder with its own config and random weights, as a spec."""
    import open_clip

    folder = tmp_path_factory.mktemp("tiny-open-clip")
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 48, "layers": 2, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    preprocessing = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocessing}))
    torch.manual_seed(0)
    torch.save(open_clip.CLIP(**config).state_dict(), folder / "open_clip_pytorch_model.bin")
    return f"open_clip:local-dir:{folder}"


@pytest.fixture(scope="module", params=["hf", "open_clip"])
def spec(request: pytest.FixtureRequest, tiny_clip: Path, tiny_open_clip: str) -> str:
    return f"hf:{tiny_clip}" if request.param == "hf" else tiny_open_clip


def test_embeddings_are_unit_vectors_independent_of_the_batch_and_identity_needs_no_model(spec: str) -> None:
    encoder = load_retrieval_encoder(spec)
    assert resolve_encoder_identity(spec) == encoder.identity
    assert load_preprocessing(spec) == encoder.preprocessing
    assert encoder.identity.dim == (16 if spec.startswith("hf:") else 24)
    assert np.isfinite(encoder.encode_texts(["word " * 500])).all()  # cut to the context
    together = encoder.encode_texts(TEXTS)
    assert together.shape == (3, encoder.dim)
    assert together.dtype == np.float32
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    for row, text in enumerate(TEXTS):
        assert np.allclose(encoder.encode_texts([text])[0], together[row], atol=1e-5)
    assert encoder.encode_texts([]).shape == (0, encoder.dim)
    size = encoder.preprocessing.size_px
    images = encoder.encode_images(torch.randn(2, 3, size, size))
    assert images.shape == (2, encoder.dim)
    assert torch.allclose(images.norm(dim=1), torch.ones(2), atol=1e-5)


def test_a_packed_encoder_in_bfloat16_embeds_as_in_float32(spec: str) -> None:
    exact, packed = (load_retrieval_encoder(spec, dtype=dtype) for dtype in ("float32", "bfloat16"))
    packed.pack()
    texts = ["a dog on a road", "two cats"]
    assert np.abs(exact.encode_texts(texts) - packed.encode_texts(texts)).max() < 0.05
    size = exact.preprocessing.size_px
    pixels = torch.randn(2, 3, size, size)
    assert (exact.encode_images(pixels) - packed.encode_images(pixels.bfloat16())).abs().max() < 0.05


def test_open_clips_own_preprocessing_is_used(tiny_open_clip: str) -> None:
    import open_clip

    preprocessing = load_preprocessing(tiny_open_clip)
    assert preprocessing == Preprocessing(48, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), crop_rounding="nearest")
    published = load_preprocessing("open_clip:RN50x64/openai")
    assert published.size_px == 448
    theirs = open_clip.get_pretrained_cfg("RN50x64", "openai")
    assert (published.mean, published.std) == (theirs["mean"], theirs["std"])


def test_identity_follows_the_weights_and_not_the_place(tiny_clip: Path, other_clip: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(tiny_clip, tmp_path / "copy")
    original, same, other = (resolve_encoder_identity(f"hf:{folder}") for folder in (tiny_clip, copy, other_clip))
    assert original.weights_sha256 == same.weights_sha256
    assert original.weights_sha256 != other.weights_sha256


def test_a_shared_tower_embeds_as_the_encoder_itself(tiny_clip: Path, other_clip: Path) -> None:
    encoder = load_retrieval_encoder(f"hf:{tiny_clip}")
    config = json.loads((tiny_clip / "config.json").read_text())["vision_config"]
    vision = VisionEncoder(config).eval()
    assert not encoder.share_weights_with(vision)  # random weights are others
    vision.transformer.load_state_dict(encoder._model.vision_model.state_dict())  # type: ignore[attr-defined]
    pixel_values = torch.randn(3, 3, 32, 32)
    expected = encoder.encode_images(pixel_values)
    assert encoder.share_weights_with(vision)
    with torch.inference_mode():
        _, class_token = vision(pixel_values)
    assert torch.allclose(encoder.project(class_token), expected, atol=1e-6)
    assert not load_retrieval_encoder(f"hf:{other_clip}").share_weights_with(vision)


def test_pixels_are_normalised_as_clip_does() -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8))
    theirs = CLIPImageProcessorPil()(image, return_tensors="pt")["pixel_values"]
    ours = normalise_pixels(torch.from_numpy(np.array(image)[None]), Preprocessing(224), torch.float32)
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("open_clip:local-dir:/no/such/folder", "no such model folder"),
        ("hf:/no/such/folder", "no such model folder"),
    ],
)
def test_what_a_spec_names_must_exist(spec: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_retrieval_encoder(spec)


def test_a_folder_that_is_no_clip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no weights file"):
        resolve_encoder_identity(f"hf:{tmp_path}")
