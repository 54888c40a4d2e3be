"""The prompt that carries retrieved captions to the decoder, and the training example built on it.

Source: Ramos et al. 2023, section 3.2; RitaRamo/smallcap src/utils.py `prep_strings` and src/template.txt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from smallcap.errors import CheckpointError
from smallcap.generation_config import PLACEHOLDER
from smallcap.model.files import tokenizer_folder
from smallcap.model.remote import shown_place
from smallcap.storage import DEFAULT_CACHE_DIR

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DecoderTokenizer: TypeAlias = "Tokenizer | PreTrainedTokenizerBase"

IGNORED_LABEL = -100  # torch.nn.functional.cross_entropy's ignore_index


@dataclass(frozen=True)
class PromptTemplate:
    """The words around the retrieved captions; the defaults are the paper's."""

    with_retrieval: str = "Similar images show\n\n||\n\nThis image shows "
    without_retrieval: str = "This image shows "
    placeholder: str = PLACEHOLDER
    separator: str = "\n\n"
    ending: str = "."  # closes the last retrieved caption

    def with_text(self, text: str | None) -> PromptTemplate:
        """Returns a template of other words, if given; without retrieval, a prompt is what follows their `||`."""
        if text is None:
            return self
        after = text.partition(PLACEHOLDER)[2].lstrip()
        return replace(self, with_retrieval=text, without_retrieval=after, placeholder=PLACEHOLDER)

    def fill(self, retrieved: Sequence[str]) -> str:
        """Returns the prompt's text for the retrieved captions, nearest first; none prompts without retrieval."""
        if not retrieved:
            return self.without_retrieval
        return self.with_retrieval.replace(self.placeholder, self.separator.join(retrieved) + self.ending)


def load_tokenizer(source: str, cache_dir: str = DEFAULT_CACHE_DIR) -> DecoderTokenizer:
    """Loads a decoder's tokenizer.

    Args:
        source: `demo`, `gpt2` (which needs no network), a folder with tokenizer.json or with vocab.json and merges.txt,
            the URI of such a folder, or a hub id such as `facebook/opt-125m`.
        cache_dir: This node's cache folder, for a copy of what a URI names.

    Returns:
        The tokenizer of these files; where there are neither, what transformers makes of the folder, which takes
        seconds to import.

    Raises:
        CheckpointError: There is no tokenizer at `source`, or it is damaged.
    """
    folder = tokenizer_folder(source, cache_dir)
    if (folder / "tokenizer.json").is_file():
        return read_tokenizer(folder / "tokenizer.json")
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if vocabulary.is_file() and merges.is_file():
        return _read_byte_level_bpe(vocabulary, merges)
    return _of_transformers(folder)


def save_tokenizer(source: str, folder: Path, cache_dir: str = DEFAULT_CACHE_DIR) -> None:
    """Writes a decoder's tokenizer as transformers saves it.

    Raises:
        CheckpointError: There is no tokenizer at `source`.
    """
    _of_transformers(tokenizer_folder(source, cache_dir)).save_pretrained(folder)


def read_tokenizer(path: Path) -> Tokenizer:
    """Reads a tokenizer.json.

    Raises:
        CheckpointError: It is damaged.
    """
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` has no type of its own for it
        raise CheckpointError("The tokenizer is damaged.", where=shown_place(path), found=str(error)) from error


def _read_byte_level_bpe(vocabulary: Path, merges: Path) -> Tokenizer:
    """Reads GPT-2's files, or OPT's, as GPT2Tokenizer of transformers does."""
    try:
        tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # `tokenizers` has no type of its own for it
        where = shown_place(vocabulary.parent)
        raise CheckpointError("The tokenizer is damaged.", where=where, found=str(error)) from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def _of_transformers(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast

    try:
        if (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return GPT2TokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "There is no tokenizer here.",
            where=shown_place(folder),
            expected="tokenizer.json, or vocab.json and merges.txt",
            found=str(error).splitlines()[0],
        ) from error


def backend_of(tokenizer: DecoderTokenizer) -> Tokenizer | None:
    """Returns the tokenizer of the library `tokenizers` that works in it; None where transformers has none."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    return tokenizer.backend_tokenizer if tokenizer.is_fast else None


def encode_texts(tokenizer: DecoderTokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Returns the token ids of each text, without special tokens."""
    if not texts:
        return []
    backend = backend_of(tokenizer)
    if backend is None:
        slow: Any = tokenizer
        encoded: list[list[int]] = slow(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return encoded
    return [encoding.ids for encoding in _encode_batch(backend, texts)]


def count_tokens(tokenizer: DecoderTokenizer, texts: Sequence[str]) -> list[int]:
    """Returns the number of tokens of each text, without special tokens; faster than listing their ids."""
    backend = backend_of(tokenizer)
    if backend is None:
        return [len(ids) for ids in encode_texts(tokenizer, texts)]
    return [len(encoding) for encoding in _encode_batch(backend, texts)]


def _encode_batch(backend: Tokenizer, texts: Sequence[str]) -> list[Any]:
    if backend.truncation or backend.padding:  # a tokenizer.json may ask for them
        backend.no_truncation()
        backend.no_padding()
    encodings: list[Any] = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    return encodings


def specials_stay_within_words(backend: Any) -> bool:
    """Says whether no added token of a tokenizer's backend reaches over white space, or takes some with it."""
    return not any(
        token.lstrip or token.rstrip or token.single_word or token.content.split() != [token.content]
        for token in backend.get_added_tokens_decoder().values()
    )


def build_prompts(
    tokenizer: DecoderTokenizer,
    template: PromptTemplate,
    retrieved: Sequence[Sequence[str]],
    bos_token_id: int | None = None,
) -> list[list[int]]:
    """Returns each image's prompt as token ids.

    Args:
        tokenizer: The decoder's tokenizer.
        template: The words around the captions.
        retrieved: Retrieved captions of each image, nearest first; empty for a prompt without retrieval.
        bos_token_id: Token that prompts start with, for a decoder that was trained with one (OPT).
    """
    prompts = encode_texts(tokenizer, [template.fill(captions) for captions in retrieved])
    return prompts if bos_token_id is None else [[bos_token_id, *prompt] for prompt in prompts]


def build_training_example(
    prompt_ids: Sequence[int],
    caption_ids: Sequence[int],
    eos_token_id: int,
    pad_token_id: int,
    max_caption_tokens: int = 25,
    length: int | None = None,
) -> tuple[list[int], list[int]]:
    """Builds the decoder's input and labels for one image and its caption.

    Labels stand where the decoder predicts them (they are not shifted afterwards): the prompt's last position predicts
    the caption's first token, and the caption's last token predicts eos.

    Args:
        prompt_ids: Token ids of the prompt.
        caption_ids: Token ids of the caption, cut to `max_caption_tokens`.
        eos_token_id: Token that ends the caption.
        pad_token_id: Token that fills the input on the right.
        max_caption_tokens: The most tokens of a caption, its eos not counted.
        length: Length that both lists are padded to; by default they are not padded.

    Returns:
        Input ids and labels of equal length; ignored positions are labelled -100.
    """
    caption = list(caption_ids)[:max_caption_tokens]
    input_ids = [*prompt_ids, *caption]
    labels = [IGNORED_LABEL] * (len(prompt_ids) - 1) + [*caption, eos_token_id]
    padding = (length or len(input_ids)) - len(input_ids)
    return input_ids + [pad_token_id] * padding, labels + [IGNORED_LABEL] * padding


def decode_captions(tokenizer: DecoderTokenizer, captions: Sequence[Sequence[int]], eos_token_id: int) -> list[str]:
    """Returns the text of each caption, a list of generated token ids, without its eos and special tokens.

    It works on the ids after the prompt, so that no wording of a retrieved caption can be taken for the prompt's end.
    """
    cut = [list(ids[: ids.index(eos_token_id)]) if eos_token_id in ids else list(ids) for ids in captions]
    backend = backend_of(tokenizer)
    if backend is not None:
        texts = backend.decode_batch(cut, skip_special_tokens=True)
    else:
        slow: Any = tokenizer
        texts = [slow.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for ids in cut]
    return [text.strip() for text in texts]
