"""Trains the demo's byte-level BPE, and writes it in two forms: with GPT-2's conventions and with CLIP's.

Both share one vocabulary, learned from captions and the words of the prompt. As in GPT-2, the first ids are the bytes
in GPT-2's order, so that `!` (SmallCap's padding) is id 0 and `.` (its end) is one token, id 13. CLIP's form adds a
start, an end and a padding token after the vocabulary.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from demo.world import WEB, captions_of, scenes_of

VOCAB_SIZE = 1_436  # enough that each noun and plural is one token
PAD_TOKEN, EOS_TOKEN = "!", "."
CLIP_START, CLIP_END, CLIP_PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"
CLIP_MAX_TOKENS = 32
PROMPT_WORDS = "Similar images show\n\n{}\n\n{}.\n\nThis image shows {}."


def train_tokenizer(scenes: int = 24_000) -> Tokenizer:
    """Learns the BPE from captions of the first web scenes, inside the prompt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(
        (PROMPT_WORDS.format(*captions_of(scene, 3)) for scene in scenes_of(WEB, scenes)), trainer
    )
    assert tokenizer.token_to_id(PAD_TOKEN) == 0 and tokenizer.encode(EOS_TOKEN).ids == [13]
    return tokenizer


def clip_form(tokenizer: Tokenizer) -> Tokenizer:
    """Returns a copy that wraps each text in start and end tokens, as CLIP's text tower expects."""
    wrapped = Tokenizer.from_str(tokenizer.to_str())
    wrapped.add_special_tokens([AddedToken(token, special=True) for token in (CLIP_START, CLIP_END, CLIP_PAD)])
    wrapped.post_processor = processors.TemplateProcessing(
        single=f"{CLIP_START} $A {CLIP_END}",
        special_tokens=[(token, wrapped.token_to_id(token)) for token in (CLIP_START, CLIP_END)],
    )
    return wrapped


def save_gpt2_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the form that the decoder uses, which adds no special tokens to a text."""
    _save(tokenizer, folder, {"pad_token": PAD_TOKEN, "eos_token": EOS_TOKEN, "model_max_length": 256})


def save_clip_tokenizer(wrapped: Tokenizer, folder: Path) -> None:
    """Writes CLIP's form as a folder that `AutoTokenizer` reads."""
    tokens = {"bos_token": CLIP_START, "eos_token": CLIP_END, "pad_token": CLIP_PAD}
    _save(wrapped, folder, {**tokens, "model_max_length": CLIP_MAX_TOKENS})


def _save(tokenizer: Tokenizer, folder: Path, settings: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
