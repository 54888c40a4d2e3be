"""What CUDA asks of an operation, as torch's FakeTensor knows it: on which devices its tensors may lie, and whether
the host must wait for a value.

FakeTensor is told the shapes, types and devices of the arguments. It raises where a GPU would refuse to mix devices,
and where the result's shape or value can only be known by looking at the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

aten = torch.ops.aten

# A composite operation falls into simpler ones, except where the CPU has a kernel for the whole.
_WHOLE = (aten.linear.default, aten.matmul.default)


def leaves(values: Iterable[Any]) -> list[Any]:
    """Returns values and the members of lists among them; operations nest no deeper."""
    found: list[Any] = []
    for value in values:
        found.extend(value) if isinstance(value, (list, tuple)) else found.append(value)
    return found


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Returns what a function makes of a value, or of the members of a list."""
    if isinstance(value, (list, tuple)):
        return type(value)([function(item) for item in value])
    return function(value)


@dataclass(frozen=True)
class Rule:
    """What an operation does with arguments of some types and devices."""

    on_cuda: bool  # where its results lie
    waits: bool  # whether the host must look at the data


@dataclass(frozen=True)
class Signature:
    """What an operation's schema says."""

    is_composite: bool
    is_view: bool
    writes: tuple[tuple[int, str], ...]  # places and names of the arguments that it overwrites

    def written(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Returns the tensors that a call overwrites."""
        given = [args[place] if place < len(args) else kwargs.get(name) for place, name in self.writes]
        return leaves(given) if given else given


@cache
def signature_of(func: Any) -> Signature:
    """Reads an operation's schema."""
    schema = func._schema
    aliases = [argument.alias_info for argument in schema.arguments]
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return Signature(
        is_composite=composite and func not in _WHOLE,
        is_view=not schema.is_mutable and any(alias is not None for alias in aliases),
        writes=tuple(
            (place, schema.arguments[place].name)
            for place, alias in enumerate(aliases)
            if alias is not None and alias.is_write
        ),
    )


def _described(value: Any) -> Any:
    """Returns all of an argument that decides which rule applies."""
    if isinstance(value, Tensor):
        return value.device, value.dtype, value.dim() == 0
    return value if isinstance(value, torch.device) else type(value)


_known: dict[Any, Rule] = {}  # each is asked of FakeTensor once in a process


def rule_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Any]) -> Rule:
    """Returns the rule for a call with these arguments, which `given` lists as leaves.

    Raises:
        RuntimeError: The call mixes devices as CUDA does not allow.
    """
    key = (func, *[_described(value) for value in given])
    if key not in _known:
        _known[key] = _ask(func, args, kwargs)
    return _known[key]


def _ask(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rule:
    with torch.inference_mode(False), torch.no_grad(), _disable_current_modes(), FakeTensorMode():
        try:
            results = func(
                *(mapped(_faked, value) for value in args),
                **{name: mapped(_faked, value) for name, value in kwargs.items()},
            )
        except (DynamicOutputShapeException, DataDependentOutputException):
            return Rule(on_cuda=True, waits=True)
    return Rule(any(leaf.is_cuda for leaf in leaves([results]) if isinstance(leaf, Tensor)), waits=False)


def _faked(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def transfers_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[str]:
    """Yields what a call moves between host and device, and what it waits for beyond its `Rule`.

    Raises:
        RuntimeError: Indices on the device are asked of a tensor on the CPU, which FakeTensor allows.
    """
    if func is aten._to_copy.default:
        target = kwargs.get("device") or args[0].device
        yield from _copy(args[0].is_cuda, target.type == "cuda", kwargs.get("non_blocking", False), args[0])
    elif func is aten.copy_.default:
        yield from _copy(args[1].is_cuda, args[0].is_cuda, len(args) > 2 and args[2], args[1])
    elif func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        indices = [index for index in args[1] if index is not None]
        if not args[0].is_cuda:
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if any(not index.is_cuda for index in indices):
            yield "upload"
        # A mask is turned into places, which the host must count; one value for all of them needs no places.
        is_fill = func is not aten.index.Tensor and args[2].numel() == 1 and not args[2].is_cuda
        if func is not aten.index.Tensor and not is_fill and any(index.dtype == torch.bool for index in indices):
            yield "value"


def _copy(from_cuda: bool, to_cuda: bool, non_blocking: bool, source: Tensor) -> Iterator[str]:
    if from_cuda and not to_cuda:
        yield "download later" if non_blocking else "download"
    elif to_cuda and not from_cuda:  # CUDA reads pageable memory only while the host waits
        yield "upload later" if non_blocking and source.is_pinned() else "upload"
