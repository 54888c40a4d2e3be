"""Every job's options: what they are, what is said about them, and how they are read.

A field of a config class, with its docstring, is an option's only declaration. Its key in `--config` files and for
`--set`, its flag, its line in `--help` and its row in docs/options.md follow from it. What depends on the machine
(device, free memory) is decided by the job and recorded beside the config.
"""

from smallcap.config.jobs import (
    AutoCount,
    CaptionConfig,
    CaptionMetric,
    CleaningConfig,
    ComputeConfig,
    DecodeMode,
    Device,
    Dtype,
    EvaluateConfig,
    GenerationConfig,
    IndexConfig,
    InputConfig,
    OutputConfig,
    RecallConfig,
    Required,
    RetrievalConfig,
    SearchDevice,
)
from smallcap.config.loading import config_difference, load_config
from smallcap.config.options import POSITIONAL, Config, Flag, Option, list_options

__all__ = [
    "POSITIONAL",
    "AutoCount",
    "CaptionConfig",
    "CaptionMetric",
    "CleaningConfig",
    "ComputeConfig",
    "Config",
    "DecodeMode",
    "Device",
    "Dtype",
    "EvaluateConfig",
    "Flag",
    "GenerationConfig",
    "IndexConfig",
    "InputConfig",
    "Option",
    "OutputConfig",
    "RecallConfig",
    "Required",
    "RetrievalConfig",
    "SearchDevice",
    "config_difference",
    "list_options",
    "load_config",
]
