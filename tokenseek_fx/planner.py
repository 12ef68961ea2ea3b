"""Planner: the cheapest way to train that holds no more than ``memory_budget``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from .config import Config, bytes_in
from .passes.graph.errors import GraphNotSupported
from .passes.lower.chunks import default_bytes
from .warnings import TokenSeekWarning

_SHARES = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
#: By how much small chunks are smaller than others.
_SMALLER = 8


def within_budget(gm: fx.GraphModule, inputs: Sequence[Any], config: Config) -> Config:
    """``config`` with what it takes to hold no more than its ``memory_budget``; the dearest, and a warning, where nothing does.

    Raises:
        GraphNotSupported: nothing does, and ``config.strict``.
    """
    if config.memory_budget is None:
        return config
    from .estimation import held  # which compiles with the backend, which plans

    def size(candidate: Config) -> int:
        with warnings.catch_warnings():  # what is to be said of the options is said when they are compiled
            warnings.simplefilter("ignore", TokenSeekWarning)
            return held(gm, inputs, replace(candidate, strict=False))

    return choose(config, size, default_bytes(inputs) // _SMALLER)


def choose(config: Config, held: Callable[[Config], int], small: int) -> Config:
    """The first candidate, from the cheapest in time to the dearest, of which ``held`` says that it is within the budget. ``small``:
    the bytes of small chunks."""
    budget, ways = bytes_in(config.memory_budget), list(_candidates(config, small))
    assert budget is not None
    sizes: list[int] = []
    for way in ways:
        sizes.append(held(way))
        if sizes[-1] <= budget:
            return way
    best = min(ways, key=lambda way: sizes[ways.index(way)])
    fewer = next((less for less in _fewer(best) if held(less) <= budget), None)
    fact = f"memory_budget={config.memory_budget!r}: forward and backward hold at least {min(sizes) / 2**20:.1f} MiB."
    error = GraphNotSupported(fact, _remedy(fewer))
    if config.strict:
        raise error
    warnings.warn(f"tokenseek: {error}", TokenSeekWarning, stacklevel=2)
    return best


def _candidates(config: Config, small: int) -> Iterator[Config]:
    """Exact ways to train, each slower than the one before. What was chosen by hand stays."""
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
    """The same with fewer tokens kept."""
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
        return f"A keep_ratio {round(1 / _SHARES[-1])} times as small does not fit either: shorten sequences, or make the batch smaller."
    name = "keep_ratio" if fewer.keep_tokens is None else "keep_tokens"
    return f"{name}={getattr(fewer, name)} would fit."
