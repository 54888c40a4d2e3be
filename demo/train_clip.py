"""Trains the demo's CLIP (transformers' `CLIPModel`) contrastively and saves it as an ordinary Hugging Face folder.

The loss has two contrastive terms: images and captions, as in CLIP, and the patches of each object and short texts,
much as in RegionCLIP (Zhong et al., CVPR 2022). These texts are its noun (`a dog`), its place (`at the top left`) and
its turn in reading order (`the second object`). If only nouns are trained, patches lose their position, and
cross-attention, which reads the patches, cannot name one object after another.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from demo.data import CLIP_MEAN, CLIP_STD, IMAGE_PX, normalise, object_table, region_masks
from demo.tokenizer import CLIP_END, CLIP_MAX_TOKENS, CLIP_PAD, CLIP_START, save_clip_tokenizer
from demo.training import Recipe, descend
from demo.world import WEB, captions_of, load_kinds, scenes_of

PATCH_PX = 16
PLACES = [f"at the {row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "middle", "right")]
TURNS = ["the first object", "the second object", "the third object"]
POSITION_SCALE = 0.6  # size of the sinusoids relative to the patch embeddings
SHIFT_PX = 4
DOMAINS_TOGETHER = 2  # in a batch
CAPTIONS_ALONE = 2  # captions without their image for each image of a batch


@dataclass(frozen=True)
class ClipRecipe(Recipe):
    """The settings of CLIP's training."""

    steps: int = 3_000
    batch_size: int = 128
    learning_rate: float = 1.5e-3
    warmup_steps: int = 80


def build_model(tokenizer: Tokenizer) -> CLIPModel:
    """Returns an untrained CLIP of about two million parameters."""
    text = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CLIP_MAX_TOKENS,
        "bos_token_id": tokenizer.token_to_id(CLIP_START),
        "eos_token_id": tokenizer.token_to_id(CLIP_END),
        "pad_token_id": tokenizer.token_to_id(CLIP_PAD),
    }
    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "image_size": IMAGE_PX,
        "patch_size": PATCH_PX,
        "hidden_act": "gelu_pytorch_tanh",  # one fused operation; CLIP's own quick_gelu takes an eighth of a step
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96))


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """Returns ids [len(texts), longest], padded at the right and cut to what the text tower holds."""
    tokenizer.enable_truncation(CLIP_MAX_TOKENS)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(CLIP_PAD), pad_token=CLIP_PAD)
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)])


def embed_images(model: CLIPModel, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the embeddings [B, D] (unit length) and the tower's `last_hidden_state` [B, P, Hv]."""
    output = model.vision_model(pixel_values=pixel_values)
    return F.normalize(model.visual_projection(output.pooler_output), dim=-1), output.last_hidden_state


def embed_texts(model: CLIPModel, input_ids: Tensor) -> Tensor:
    """Returns the embeddings [B, D], unit length."""
    return F.normalize(model.text_projection(model.text_model(input_ids=input_ids).pooler_output), dim=-1)


def caption_loss(similarities: Tensor, image_objects: Tensor, text_objects: Tensor) -> Tensor:
    """Returns CLIP's cross-entropy in both directions, where a scene's matches are all captions of the same objects.

    What else a caption says, such as the ground, is left to the patches: in a large datastore, captions that agree in
    it and not in the objects would come first.

    Args:
        similarities: [B, T] scaled similarities of images to texts. The first B texts are the images' own captions; the
            others have no image.
        image_objects: [B] a number for each scene, the same for scenes with the same objects.
        text_objects: [T] the numbers of the captions' scenes.
    """
    same = (image_objects[:, None] == text_objects).float()
    own = same[:, : len(same)]
    to_texts = F.cross_entropy(similarities, same / same.sum(1, keepdim=True))
    to_images = F.cross_entropy(similarities[:, : len(own)].T, own / own.sum(1, keepdim=True))
    return (to_texts + to_images) / 2


def region_logits(model: CLIPModel, hidden: Tensor, text_embeds: Tensor, places: Tensor) -> Tensor:
    """Returns the scaled similarity of the patches of each object to each text; [B, 3, number of texts]."""
    patches = hidden[:, 1:]  # without the class token
    regions = region_masks(places, IMAGE_PX // PATCH_PX) @ patches
    regions = F.normalize(model.visual_projection(model.vision_model.post_layernorm(regions)), dim=-1)
    return model.logit_scale.exp() * regions @ text_embeds.T


def place_classes(places: Tensor) -> Tensor:
    """Returns the index into PLACES of places [..., 3] (x, y in shares of the side, scale)."""
    column, row = (places[..., :2] * 3).long().clamp(0, 2).unbind(-1)
    return row * 3 + column


def region_loss(logits: Tensor, kinds: Tensor, places: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Returns the cross-entropy of object patches over nouns, places and turns, and the accuracy of each of these."""
    present = kinds >= 0
    turns = torch.arange(kinds.shape[1]).expand_as(kinds)
    sizes = [logits.shape[-1] - len(PLACES) - len(TURNS), len(PLACES), len(TURNS)]
    scores = torch.split(logits[present], sizes, dim=-1)
    targets = [kinds[present], place_classes(places)[present], turns[present]]
    pairs = list(zip(scores, targets, strict=True))
    right = [(score.argmax(-1) == target).float().mean().item() for score, target in pairs]
    loss = torch.stack([F.cross_entropy(*pair) for pair in pairs]).sum()
    return loss, dict(zip(("nouns", "places", "turns"), right, strict=True))


@torch.no_grad()
def add_sinusoids(model: CLIPModel, images: np.ndarray) -> None:
    """Adds sines and cosines of x and y to the position embeddings, in proportion to the patch embeddings.

    CLIP initialises position embeddings at a hundredth of the size of patch embeddings; a short training keeps that.
    """
    embeddings = model.vision_model.embeddings
    grid = IMAGE_PX // PATCH_PX
    centres = (torch.arange(grid) + 0.5) / grid
    waves = torch.stack([wave(math.pi * rate * centres) for rate in (0.5, 1, 2) for wave in (torch.sin, torch.cos)], 1)
    waves = waves - waves.mean(0)  # [grid, 6]
    waves_x, waves_y = waves[None].expand(grid, grid, 6), waves[:, None].expand(grid, grid, 6)
    axes = torch.linalg.qr(torch.randn(model.config.vision_config.hidden_size, 12))[0]
    sinusoids = torch.cat([waves_x, waves_y], -1).flatten(0, 1) @ axes.T  # [grid * grid, hidden]
    patches = embeddings.patch_embedding(normalise(np.array(images)))
    embeddings.position_embedding.weight[1:] += sinusoids * (POSITION_SCALE * patches.std() / sinusoids.std())


def train_clip(recipe: ClipRecipe, images: np.ndarray, tokenizer: Tokenizer, checkpoint: Path) -> CLIPModel:
    """Trains a CLIP on rendered scenes, from where an earlier attempt stopped.

    Args:
        recipe: The settings that decide the result.
        images: uint8 [recipe.scenes, IMAGE_PX, IMAGE_PX, 3], the first scenes of WEB.
        tokenizer: The tokenizer in CLIP's form.
        checkpoint: The file of the training's checkpoint.
    """
    torch.manual_seed(recipe.seed)
    model = build_model(tokenizer).train()
    add_sinusoids(model, images[: recipe.batch_size])
    descend("clip", model.parameters(), recipe, partial(losses, recipe, model, images, tokenizer), checkpoint)
    return model.eval()


def losses(
    recipe: ClipRecipe, model: CLIPModel, images: np.ndarray, tokenizer: Tokenizer, first: int
) -> Iterator[tuple[Tensor, dict[str, float]]]:
    """Yields the loss of each step from `first` on, and the shares of captions and regions that are matched right."""
    scenes = scenes_of(WEB, recipe.scenes)
    captions = [captions_of(scene, recipe.captions_per_scene) for scene in scenes]
    kinds, places = object_table(scenes)
    nouns = [f"{kind.article} {kind.noun}" for kind in load_kinds()]
    region_texts = tokenize(tokenizer, nouns + PLACES + TURNS)
    numbers: dict[frozenset[tuple[str, int]], int] = {}
    objects = torch.tensor([numbers.setdefault(frozenset(scene.kinds.items()), len(numbers)) for scene in scenes])
    domains = np.array([scene.domain for scene in scenes])
    rows_of = [np.flatnonzero(domains == domain) for domain in np.unique(domains)]
    for step in range(first, recipe.steps):
        rng = np.random.default_rng([recipe.seed, step])
        rows, others = draw_batch(rows_of, recipe.batch_size, rng)
        pixels, moved = shift(normalise(np.array(images[rows])), places[rows], rng)
        told = np.concatenate([rows, others])
        texts = tokenize(tokenizer, [captions[row][rng.integers(recipe.captions_per_scene)] for row in told])
        image_embeds, hidden = embed_images(model, pixels)
        text_embeds, region_embeds = embed_texts(model, texts), embed_texts(model, region_texts)
        similarities = model.logit_scale.exp() * image_embeds @ text_embeds.T
        regions_loss, right = region_loss(region_logits(model, hidden, region_embeds, moved), kinds[rows], moved)
        matched = (objects[told][similarities.argmax(1)] == objects[rows]).float().mean().item()
        captions_loss = caption_loss(similarities, objects[rows], objects[told])
        yield captions_loss + regions_loss, {"captions": matched, **right}
        model.logit_scale.data.clamp_(max=math.log(100))


def draw_batch(
    rows_of: Sequence[np.ndarray], batch_size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of scenes of a few domains, and of further ones of the same domains for their captions.

    Among scenes of all domains, the domain alone would nearly suffice to find an image's caption.

    Args:
        rows_of: The rows of each domain.
        batch_size: Number of scenes, a multiple of DOMAINS_TOGETHER.
        rng: Draws domains and scenes.
    """
    share = batch_size // DOMAINS_TOGETHER
    drawn = [
        rng.choice(rows_of[domain], size=(1 + CAPTIONS_ALONE) * share, replace=False)
        for domain in rng.choice(len(rows_of), size=DOMAINS_TOGETHER, replace=False)
    ]
    return np.concatenate([rows[:share] for rows in drawn]), np.concatenate([rows[share:] for rows in drawn])


def shift(pixels: Tensor, places: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Moves the whole batch, and its places, by up to SHIFT_PX in both directions."""
    dx, dy = (int(d) for d in rng.integers(-SHIFT_PX, SHIFT_PX + 1, 2))
    padded = F.pad(pixels, [SHIFT_PX] * 4, mode="replicate")
    pixels = padded[:, :, SHIFT_PX - dy : SHIFT_PX - dy + IMAGE_PX, SHIFT_PX - dx : SHIFT_PX - dx + IMAGE_PX]
    return pixels, places + torch.tensor([dx / IMAGE_PX, dy / IMAGE_PX, 0.0])


def save_clip(model: CLIPModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes weights (fp16), config, tokenizer and image preprocessing as one Hugging Face folder."""
    model.to(torch.float16).save_pretrained(folder)
    model.float()
    save_clip_tokenizer(tokenizer, folder)
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": IMAGE_PX},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": IMAGE_PX, "width": IMAGE_PX},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n", encoding="utf-8")
