"""Variants of a captioning run: what each has of its own, and the options that all of them share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from smallcap import storage
from smallcap.config import CaptionConfig
from smallcap.errors import ConfigError
from smallcap.options import list_options, load_config

MOST_VARIANTS = 32
_NAME = re.compile("[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_NEXT_SETTING = re.compile(r",(?=\s*[A-Za-z_][A-Za-z_.-]*\s*=)")  # a comma in a value is followed by something else
_OWN = "model, k (or retrieval.k), and the options of generation, such as num_beams or template"


@dataclass(frozen=True)
class Variant:
    """A run of its own, in a folder of its name.

    Attributes:
        name: Its name.
        config: All its options.
    """

    name: str
    config: CaptionConfig


def make_variants(config: CaptionConfig, texts: Sequence[str]) -> list[Variant]:
    """Returns the variants that texts such as `beams8:num_beams=8,k=2` describe, in their order.

    Args:
        config: The options that they share.
        texts: For each variant its name, and after a colon the options that it has of its own.

    Raises:
        ConfigError: A name cannot be a folder's or is there twice, or an option is unknown, wrong, or shared by all.
    """
    variants = [_make_variant(config, text) for text in texts]
    names = [variant.name for variant in variants]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ConfigError("Two variants have one name.", where=f"--variant {repeated[0]}", remedy="Rename one of them.")
    if len(variants) > MOST_VARIANTS:
        raise ConfigError(
            "There are too many variants for one pass.",
            where="--variant",
            expected=f"at most {MOST_VARIANTS}",
            found=str(len(variants)),
            remedy="Make several passes; the same --out may take them all.",
        )
    return variants


def _make_variant(config: CaptionConfig, text: str) -> Variant:
    name, _, settings = text.partition(":")
    where = f"--variant {name}"
    if not _NAME.fullmatch(name):
        raise ConfigError(
            "A variant's name cannot be that of a folder.",
            where=where,
            expected="letters, digits, _, - and dots, as in --variant beams8:num_beams=8,k=2",
            found=text,
        )
    sets = [_full_setting(setting, where) for setting in _NEXT_SETTING.split(settings)] if settings.strip() else []
    out = storage.join(config.out, name)
    try:
        return Variant(name, load_config(CaptionConfig, flags={"out": out}, sets=sets, base=config.model_dump()))
    except ConfigError as error:
        error.where = f"{where}: {error.where}".removesuffix(": ")
        raise


def _full_setting(setting: str, where: str) -> str:
    """Returns a setting with the whole key of its option.

    Raises:
        ConfigError: It has no value, or all variants share the option.
    """
    name, equals, value = setting.partition("=")
    key = name.strip().replace("-", "_")
    if not equals:
        raise ConfigError(
            "A variant's option needs a value.", where=f"{where}: {setting}", expected="NAME:option=value"
        )
    keys = [option.key for option in list_options(CaptionConfig)]
    named = [known for known in keys if key in (known, known.rpartition(".")[2])]
    own = [known for known in named if _is_own(known)]
    if named and not own:
        raise ConfigError(
            "All variants share this option.",
            where=f"{where}: {named[0]}",
            expected=f"an option that a variant can have of its own: {_OWN}",
            remedy="Give it for all of them, outside --variant, or make another run.",
        )
    return f"{own[0] if own else key}={value}"


def _is_own(key: str) -> bool:
    return key in ("model", "retrieval.k") or key.startswith("generation.")
