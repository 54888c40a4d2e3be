"""Reads and writes a decoder's config, whose keys depend on the kind of decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from smallcap.decoding.text_decoder import DecoderConfig

_COMMON = {name: name for name in ("model_type", "vocab_size", "encoder_hidden_size", "cross_attention_reduce_factor")}


@dataclass(frozen=True)
class ConfigFormat:
    """How one kind of decoder writes the fields of a `DecoderConfig`, in the reference and in transformers."""

    names: Mapping[str, str]  # field to key, without the keys that all kinds share
    defaults: Mapping[str, Any]  # by key, for what a config may leave out
    fixed: Mapping[str, Any]  # by field, what the reference fixes in its code, whatever the config says
    extra: Mapping[str, Any] = field(default_factory=dict)  # by key, what the reference reads besides the fields

    def parse(self, values: Mapping[str, Any]) -> DecoderConfig:
        """Reads a config.

        Raises:
            KeyError: A key is missing.
        """
        known = {"cross_attention_reduce_factor": 1, **self.defaults, **values}
        names = {name: key for name, key in (_COMMON | dict(self.names)).items() if name not in self.fixed}
        return DecoderConfig(**{name: known[key] for name, key in names.items()}, **self.fixed)

    def dump(self, config: DecoderConfig) -> dict[str, Any]:
        """Returns the config that the reference loads; the inverse of `parse`."""
        fields = asdict(config)
        written = {key: fields[name] for name, key in (_COMMON | dict(self.names)).items()}
        return {**written, "add_cross_attention": True, "is_decoder": True, **self.extra}
