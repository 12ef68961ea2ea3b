"""Planner: the fastest options that hold no more than ``memory_budget``."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from .config import Config, bytes_in
from .passes.graph.errors import GraphNotSupported
from .passes.lower.chunks import default_bytes
from .warnings import TokenSeekWarning

_SHARES = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
#: Factor by which small chunks are smaller than the default.
_SMALLER = 8


def within_budget(gm: fx.GraphModule, inputs: Sequence[Any], config: Config) -> Config:
    """``config`` with the fastest options that fit its ``memory_budget``.

    If none fits, a ``TokenSeekWarning`` is given and the options that hold the least are returned.

    Raises:
        GraphNotSupported: none fits, and ``config.strict`` is set.
    """
    if config.memory_budget is None:
        return config
    from .estimation import held  # here, because estimation imports the planner

    def size(candidate: Config) -> int:
        with warnings.catch_warnings():  # they are given again when the choice is compiled
            warnings.simplefilter("ignore", TokenSeekWarning)
            return held(gm, inputs, replace(candidate, strict=False))

    return choose(config, size, default_bytes(inputs) // _SMALLER)


def choose(config: Config, held: Callable[[Config], int], small: int) -> Config:
    """The first candidate, from the fastest to the slowest, that fits the budget; else the smallest, with a warning.

    ``held``: returns the bytes that a candidate holds. ``small``: bytes of small chunks.

    Raises:
        GraphNotSupported: none fits, and ``config.strict`` is set.
    """
    budget, ways = bytes_in(config.memory_budget), list(_candidates(config, small))
    assert budget is not None
    sizes: list[int] = []
    for way in ways:
        sizes.append(held(way))
        if sizes[-1] <= budget:
            return way
    best = min(ways, key=lambda way: sizes[ways.index(way)])
    fewer = list(_fewer(best))
    first = bisect_left(fewer, True, key=lambda less: held(less) <= budget)
    fact = f"memory_budget={config.memory_budget!r}: forward and backward hold at least {min(sizes) / 2**20:.1f} MiB."
    error = GraphNotSupported(fact, _remedy(fewer[first] if first < len(fewer) else None))
    if config.strict:
        raise error
    warnings.warn(f"tokenseek: {error}", TokenSeekWarning, stacklevel=2)
    return best


def _candidates(config: Config, small: int) -> Iterator[Config]:
    """Options with the same gradients, each slower than the one before. Options that the user set stay."""
    if config.recompute is None:
        yield replace(config, recompute="none")
        config = replace(config, recompute="rows")
    yield config
    if config.chunk_bytes is None:
        config = replace(config, chunk_bytes=small)
        yield config
    if config.kv == "keep" and config.kv_grad == "selected":
        yield replace(config, kv="recompute")


def _fewer(config: Config) -> Iterator[Config]:
    """``config`` with fewer and fewer kept tokens."""
    for share in _SHARES:
        if config.keep_tokens is not None:
            if config.keep_tokens * share >= 1:
                yield replace(config, keep_tokens=int(config.keep_tokens * share))
        elif isinstance(config.keep_ratio, Sequence):
            yield replace(config, keep_ratio=[ratio * share for ratio in config.keep_ratio])
        elif config.keep_ratio is not None:
            yield replace(config, keep_ratio=config.keep_ratio * share)


def _remedy(fewer: Config | None) -> str:
    if fewer is None:
        times = round(1 / _SHARES[-1])
        return f"A keep_ratio {times} times smaller does not fit either: use shorter sequences or a smaller batch."
    name = "keep_ratio" if fewer.keep_tokens is None else "keep_tokens"
    return f"{name}={getattr(fewer, name)} would fit."
