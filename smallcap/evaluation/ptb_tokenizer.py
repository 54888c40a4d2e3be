"""Captions as the words that caption metrics count: Penn Treebank tokens in lower case, without punctuation.

The official tokenizer is Stanford's, a Java program that pycocoevalcap brings. Where no Java runs, `tokenize_in_python`
follows its rules as far as captions need them; on the captions of Flickr8k, as they are and with their punctuation
closed up, both give the same words.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Literal

from smallcap.errors import RunError
from smallcap.evaluation.java_tools import has_java, pycocoevalcap_folder, run_java

Tokenizer = Literal["ptb-java", "ptb-python"]

# Tokens that pycocoevalcap drops. Brackets are not among them: `-lowerCase` has already made them -lrb- and -rrb-.
PUNCTUATION = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";")
)
_JAR = "stanford-corenlp-3.4.1.jar"
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", '"': "''"}
_SAME = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "--", "—": "--", "…": "...", "£": "#", "€": "$"})
_BEYOND_BMP = re.compile("[\U00010000-\U0010ffff]")  # emoji: the Java program skips them
_ABBREVIATIONS = (
    "mr|mrs|ms|dr|st|jr|sr|vs|etc|mt|ft|co|inc|ltd|corp|bros|ave|blvd|rd|prof|rev|gen|col|sgt|capt|lt|gov|sen|rep|hon"
    "|jan|feb|apr|aug|sept|oct|nov|dec|mo|ca|ph\\.d"
)
CROSSES_SPACES = re.compile(r"<|\bno\.\s", re.IGNORECASE)  # the only rules that look beyond a space
_TOKEN = re.compile(
    rf"""
      (?:https?://|www\.)[^\s<>"]*[^\s<>"'.,;:!?)\]]           # URLs
    | [\w.+-]+@[\w-]+(?:\.[\w-]+)+                             # addresses
    | </?[a-z][^<>]*>                                          # tags
    | can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b) | (?:gim|lem)(?=me\b) | y'(?=all\b) | 't(?=is\b|was\b)
    | o'clock\b
    | [^\W\d_]+(?=n't\b) | n't\b                               # do n't
    | '(?:s|m|d|re|ve|ll)\b                                    # dog 's
    | '(?:em|\d0s)\b | 'n'
    | [\#@][^\W\d]\w*
    | (?:[a-z]\.)+(?!\w)                                       # u.s., the letter p.
    | \b(?:{_ABBREVIATIONS})\.(?!\w) | \bno\.(?=\s*\d)
    | \d+:\d\d(?=[ap]m\b) | \d+(?:[.,:/]\d+)*(?:[\w-]*\w)?
    | \w+(?:[-./@!_]\w+)*                                      # t-shirt, and/or
    | --+ | \.\.\. | [?!]{{2,}} | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)


def tokenize_captions(captions: Sequence[str]) -> tuple[list[str], Tokenizer]:
    """Tokenises captions with the official tokenizer where Java runs, and in Python elsewhere.

    Args:
        captions: Any texts; line breaks in them count as spaces.

    Returns:
        Each caption's tokens, joined by spaces, and the tokenizer that made them.

    Raises:
        RunError: The Java program fails.
    """
    if has_java():
        return tokenize_in_java(captions), "ptb-java"
    return [tokenize_in_python(caption) for caption in captions], "ptb-python"


def tokenize_in_java(captions: Sequence[str]) -> list[str]:
    """Tokenises captions with Stanford's PTBTokenizer, in one process for all of them.

    Raises:
        RunError: The program fails, or returns a wrong number of lines.

    Source: pycocoevalcap/tokenizer/ptbtokenizer.py, which writes its input into its own folder instead.
    """
    if not captions:
        return []
    jar = pycocoevalcap_folder() / "tokenizer" / _JAR
    options = ["-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    lines = [" ".join(caption.split()) for caption in captions]
    output = run_java(options, "".join(line + "\n" for line in lines), "The PTB tokenizer")
    tokenized = output.split("\n")[:-1]
    if len(tokenized) != len(captions):
        raise RunError(
            "The PTB tokenizer returned a wrong number of captions.",
            where=str(jar),
            expected=str(len(captions)),
            found=str(len(tokenized)),
        )
    return [_without_punctuation(line.split(" ")) for line in tokenized]


def tokenize_in_python(caption: str) -> str:
    """Returns a caption's tokens, joined by spaces, by the rules of Stanford's PTBTokenizer.

    Rules that captions do not need are missing (fractions, ordinals in foreign scripts, smileys, most abbreviations).
    """
    text = caption if caption.isascii() else _BEYOND_BMP.sub("", caption).translate(_SAME)
    chunks = [text] if CROSSES_SPACES.search(text) else text.split()
    return " ".join(filter(None, map(_tokenize_chunk, chunks)))


@functools.lru_cache(maxsize=1 << 16)
def _tokenize_chunk(chunk: str) -> str:
    """Tokenises the text between two spaces; captions repeat most of these texts."""
    return _without_punctuation([_BRACKETS.get(token, token).lower() for token in _TOKEN.findall(chunk)])


def _without_punctuation(tokens: list[str]) -> str:
    return " ".join(token for token in tokens if token and token not in PUNCTUATION)
