"""The options of decoding, which jobs and Python code share."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from smallcap.options import Config, Flag

PLACEHOLDER = "||"  # in a prompt's text: where the retrieved captions stand


class GenerationConfig(Config):
    """How captions are decoded. The checkpoint decides what is not given, usually as the paper does."""

    num_beams: int | None = Field(None, ge=1, le=64)
    """Beams of the search (the paper: 3). 1 decodes greedily."""
    max_new_tokens: int | None = Field(None, ge=1, le=512)
    """The most tokens that a caption may have, its end token included (the paper: 25)."""
    length_penalty: float | None = Field(None, ge=-10, le=10)
    """A caption's score is divided by its length to this power (the paper: 0, which leaves plain sums)."""
    no_repeat_ngram_size: int = Field(0, ge=0)
    """No caption repeats a sequence of this many tokens; 0 allows it. Captions may quote the prompt."""
    num_captions: int = Field(1, ge=1, le=64)
    """Captions per image, best first. A search gives at most `num_beams`."""
    template: Annotated[str | None, Flag(any_text=True)] = None
    """Text of the prompt, with `||` where the retrieved captions stand; by default the checkpoint's. Without retrieval
    the prompt is what follows the `||`."""
    rerank: bool = False
    """Of all captions that the search finds, take those that fit the image best by `clip_score`. It needs the retrieval
    encoder, and a pass of its text encoder for each beam."""
    do_sample: bool = False
    """Draw captions at random instead of searching for the most likely one."""
    temperature: float = Field(1.0, ge=0.01, le=100)
    """Divides the logits before sampling. Below 1, likely tokens become likelier."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample only from the most likely tokens that have this probability together."""
    seed: int = Field(0, ge=0)
    """Seed of sampling. The same seed draws the same captions, in any batch and on any number of actors."""

    @model_validator(mode="after")
    def _search_and_sampling_are_apart(self) -> Self:
        if not self.do_sample and self.num_beams is not None and self.num_captions > self.num_beams:
            raise ValueError(f"--num-captions is {self.num_captions}, but --num-beams {self.num_beams} finds no more")
        if not self.do_sample and (self.temperature, self.top_p) != (1.0, 1.0):
            raise ValueError("--temperature and --top-p need --do-sample")
        return self

    @field_validator("template")
    @classmethod
    def _has_one_place_for_captions(cls, template: str | None) -> str | None:
        if template is not None and (
            template.count(PLACEHOLDER) != 1 or not template.partition(PLACEHOLDER)[2].strip()
        ):
            raise ValueError(f"a text with {PLACEHOLDER} once, and words after it")
        return template
