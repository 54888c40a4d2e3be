"""Trains the demo's small GPT-2 on caption text alone; it is frozen before cross-attention is trained.

Documents are single captions, several captions of one scene, and captions that share objects inside SmallCap's prompt,
from scenes of all domains. No image is involved, but the decoder learns to use its prompt, as a large language model
would.
"""

import itertools
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from demo.tokenizer import EOS_TOKEN, PAD_TOKEN
from demo.training import Recipe, batches_of_like_length, descend
from demo.world import WEB, Scene, captions_of, scenes_of

PROMPT = "Similar images show\n\n{}.\n\nThis image shows "
IGNORED = -100
MOST_RELATED = 7  # captions in a prompt


def build_language_model(tokenizer: Tokenizer) -> GPT2LMHeadModel:
    """Returns an untrained GPT-2 of about one million parameters."""
    end = tokenizer.token_to_id(EOS_TOKEN)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=tokenizer.get_vocab_size(),
            n_positions=256,
            n_embd=128,
            n_layer=4,
            n_head=4,
            initializer_range=0.08,  # 1 / sqrt(n_embd); with 0.02 nouns stay alike and prompts are not copied
            activation_function="gelu_pytorch_tanh",  # GPT-2's gelu_new as one operation: twice as fast
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=tokenizer.token_to_id(PAD_TOKEN),
        )
    )


class Documents:
    """Draws training texts; captions that share an object are found through the objects of their scenes."""

    def __init__(self, scenes: list[Scene], captions_per_scene: int, tokenizer: Tokenizer) -> None:
        self.scenes = scenes
        self.captions = [captions_of(scene, captions_per_scene) for scene in scenes]
        self.tokenizer = tokenizer
        self.rows_of: dict[str, list[int]] = defaultdict(list)
        for row, scene in enumerate(scenes):
            for noun in scene.kinds:
                self.rows_of[noun].append(row)

    def draw(self, rng: random.Random) -> list[int]:
        """Returns the token ids of one document."""
        row = rng.randrange(len(self.scenes))
        caption = rng.choice(self.captions[row])
        form = rng.random()
        if form < 0.1:
            return self._ids(caption + EOS_TOKEN)
        if form < 0.35:  # one scene told several times: from these it first learns to repeat names
            return self._ids("\n\n".join(rng.sample(self.captions[row], 4)) + EOS_TOKEN)
        # The prompt ends in a space and the caption starts without one, as SmallCap joins them.
        related = self._related(row, rng.randint(1, MOST_RELATED), rng)
        return self._ids(PROMPT.format("\n\n".join(related))) + self._ids(caption + EOS_TOKEN)

    def _related(self, row: int, count: int, rng: random.Random) -> list[str]:
        """Draws captions: most are of this scene or of one that shares an object with it, a few are of any scene.

        Those that share most come first, as retrieved captions do: a decoder that has only seen prompts in any order
        does not know which caption to trust.
        """
        nouns = list(self.scenes[row].kinds)
        rows = []
        for _ in range(count):
            kind = rng.random()
            if kind < 0.35:
                rows.append(row)
            elif kind < 0.9:
                rows.append(rng.choice(self.rows_of[rng.choice(nouns)]))
            else:
                rows.append(rng.randrange(len(self.scenes)))
        rows.sort(key=lambda other: self._likeness(row, other), reverse=True)
        return [rng.choice(self.captions[other]) for other in rows]

    def _likeness(self, row: int, other: int) -> float:
        """Returns the share of the objects of two scenes that both have."""
        first, second = self.scenes[row].kinds, self.scenes[other].kinds
        return (first & second).total() / (first | second).total()

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text).ids)


def document_batches(
    documents: Documents, steps: int, batch_size: int, rng: random.Random
) -> Iterator[list[list[int]]]:
    """Yields batches of documents of like length."""
    return batches_of_like_length(
        lambda count: [documents.draw(rng) for _ in range(count)], len, steps, batch_size, rng
    )


def pad_documents(documents: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Returns ids [B, longest], padded at the right, and labels with IGNORED at the padding."""
    longest = max(map(len, documents))
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids in documents])
    real = torch.tensor([[True] * len(ids) + [False] * (longest - len(ids)) for ids in documents])
    return ids, torch.where(real, ids, IGNORED)


def train_language_model(recipe: Recipe, tokenizer: Tokenizer, checkpoint: Path) -> GPT2LMHeadModel:
    """Trains a GPT-2 on text, from where an earlier attempt stopped; `checkpoint` is the file for that."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    documents = Documents(scenes_of(WEB, recipe.scenes), recipe.captions_per_scene, tokenizer)
    model = build_language_model(tokenizer).train()

    def losses(first: int) -> Iterator[tuple[Tensor, dict[str, float]]]:
        batches = document_batches(documents, recipe.steps, recipe.batch_size, rng)
        for batch in itertools.islice(batches, first, None):
            ids, labels = pad_documents(batch)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            yield F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED), {}

    descend("language model", model.parameters(), recipe, losses, checkpoint)
    # The same function, under the name that it has in GPT-2 checkpoints and so in the reference.
    model.config.activation_function = "gelu_new"
    return model.eval()
