"""Measures captions by their words, without a scorer: how much retrieval found, and how diverse captions are.

Words are those of `tokenize_in_python`, on every machine: lower case, no punctuation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from smallcap.evaluation.ptb_tokenizer import tokenize_in_python

# Words that name nothing visible: articles, pronouns, prepositions, conjunctions, auxiliaries.
_FUNCTION_WORDS_TEXT = """
    a an the this that these those some any each every both all another other others one ones
    i you he she it we they me him her us them his hers its our their theirs my your himself herself itself themselves
    who whom whose which what where when why how there here
    of in on at by for with without from to into onto out off over under above below up down through across along
    around about against between among behind beside besides near next upon within while during before after as than
    like and or but nor so yet if because not n't no
    is are was were be been being am 's 're 'm 'd 'll 've has have had having do does did doing
    can ca could will wo would shall should may might must
"""
_FUNCTION_WORDS = frozenset(_FUNCTION_WORDS_TEXT.split())


@dataclass(frozen=True)
class Diversity:
    """How much captions differ from each other.

    Args:
        distinct_1: Number of different words over that of all words.
        distinct_2: Number of different pairs of neighbouring words over that of all such pairs.
        vocabulary: Number of different words.

    Source: Li et al., A Diversity-Promoting Objective Function for Neural Conversation Models (2016), section 5.
    """

    distinct_1: float
    distinct_2: float
    vocabulary: int


def content_words(tokenized: Iterable[str]) -> set[str]:
    """Returns the different words of tokenised captions that are not function words and have a letter or a digit."""
    return set(filter(is_content_word, {word for caption in tokenized for word in caption.split()}))


@lru_cache(maxsize=1 << 16)
def is_content_word(word: str) -> bool:
    """Says whether a word is not a function word and has a letter or a digit."""
    return word not in _FUNCTION_WORDS and any(letter.isalnum() for letter in word)


def retrieval_recall(references: Sequence[str], retrieved: Sequence[str]) -> float:
    """Returns the share of the references' content words that retrieved captions have; NaN if there are none.

    Args:
        references: Tokenised references.
        retrieved: Tokenised captions.
    """
    wanted = content_words(references)
    return len(wanted & content_words(retrieved)) / len(wanted) if wanted else float("nan")


def measure_diversity(captions: Iterable[str]) -> Diversity:
    """Measures how much captions differ; all figures are 0 if they have no words."""
    words: set[str] = set()
    pairs: set[tuple[str, str]] = set()
    word_count = pair_count = 0
    for caption in captions:
        tokens = tokenize_in_python(caption).split()
        words.update(tokens)
        pairs.update(pairwise(tokens))
        word_count += len(tokens)
        pair_count += max(0, len(tokens) - 1)
    return Diversity(len(words) / max(1, word_count), len(pairs) / max(1, pair_count), len(words))
