"""The options of the backend."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeGuard

import torch

from .passes.analysis.token_axes import RowPlace
from .passes.graph.errors import ConfigError
from .passes.keep.kv_modes import KV_MODES
from .passes.plan import Plan
from .passes.streams.select import METHODS, Scorer, Select, method_of, needs_of
from .passes.streams.signals import Signals
from .scorers import parameters_of, scorer_named, scorer_names

_INNER = ("inductor", "aot_eager", "eager")
_LOGITS = ("keep", "drop")
_CHOICES = {
    "inner": _INNER,
    "logits": _LOGITS,
    "gradient_of": ("last_block", "head"),
    "kv_grad": ("selected", "all"),
}
_RECOMPUTE = ("none", "rows")
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_LAYERS = ("last", "first", "all")
_REPORTS = ("full", "kept")
_WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Config:
    """Options of ``torch.compile(model, backend="tokenseek", options={...})``.

    The first paragraph of each entry is its line in the table of docs/backend.md (``tests/generated.py``).

    Args:
        keep_ratio: Share of the tokens of each sequence to train on, 0 < r <= 1; k = ceil(r T), exact for the decimal
            as written. A list has one ratio for each token axis, the loss's axis first (of an encoder-decoder: decoder,
            encoder).
        keep_tokens: The number k of tokens to train on, instead of ``keep_ratio``; all tokens if a sequence is shorter.
        scorer: A name, or a function ``ScoreInputs -> scores [B, T]``.
        alpha: Factor of ``log I1`` (attention received) in the score of ``tokenseek``, >= 0.
        beta: Factor of ``minmax I2`` (gradient) in the score of ``tokenseek``, >= 0.
        attention_layers: The attentions whose weights are scored: "last", "first", "all", or a list of numbers
            (negative: from the end).
        gradient_of: Where the gradient is taken: "last_block", at the input of the last block; "head", at the input of
            the head, which is cheaper.
        select: How tokens are chosen by their scores: "topk" or "sample". ``None``: "sample" for the scorers ``loss``
            and ``gradient`` if the loss is over tokens, else "topk".

            "topk" keeps the highest scores. "sample" draws tokens with probability by score and weights their losses by
            the inverse inclusion probability, so that the expected loss is the loss of all tokens.
        mix: Share of the uniform distribution over labelled tokens in the probabilities of "sample", 0 to 1.
        weight_clip: Largest weight of a drawn token in "sample", >= 1.
        labelled_first: Share of the kept tokens that is given to labelled tokens first, 0 to 1.
        keep_label: Keep at least one labelled token of every sequence that has any.

            If none of the chosen tokens has a label, the labelled token with the highest score replaces the chosen
            token with the lowest.
        pinned: Positions that are always kept (negative: from the end). The positions that a classification head reads
            are found automatically.
        kv_grad: "selected" cuts the gradient through keys and values of tokens that are not kept; "all" keeps the
            gradient of the projections that compute them, at the cost of saving the input of every block.
        recompute: What backward recomputes of the kept rows: "none"; "rows", every block from its input rows; or a
            limit on the saved bytes, a number or "64MiB". ``None``: what ``memory_budget`` requires, else "rows" except
            for the last blocks, whose values fit in memory that chunked prefill needs anyway.

            "rows" costs a second forward of the kept rows. With a limit, as few of the first blocks are recomputed as
            needed. ``None`` keeps the last blocks whose values fit in ``3 * chunk_bytes`` if the prefill runs in chunks
            (in less if the gradient of the head's weight takes more than a chunk).
        kv: What is kept of the keys and values of all tokens until backward: "keep", all of it; "recompute", smaller
            values that they are recomputed from; "offload", copies in host memory (on a GPU); "fp8", copies in 8 bits.

            "recompute" computes keys and values again in the forward of the kept rows and in its backward, if there are
            smaller values to compute them from: mostly the input of a block with as many key heads as query heads. With
            "fp8" the loss is exact and the gradient is approximate.
        chunk_bytes: Limit on the bytes of an intermediate value in the forward of all tokens, a number or "32MiB": the
            tokens go through projections and MLP of a block in chunks. ``None``: 12 MiB on a CPU, 256 MiB on a GPU.
        memory_budget: Limit on the bytes that forward and backward may hold beside parameters, gradients and optimizer
            states that exist before, a number or "8GiB". ``recompute``, ``chunk_bytes`` and ``kv`` are chosen for it at
            compile time, by estimates, unless they are set.
        rounds: In how many rounds backward runs the kept tokens, >= 1: a few of them at a time, over keys and values of
            one forward of all tokens. More rounds need less memory; the gradient is the same.

            With ``keep_ratio=1`` this is the exact gradient of all tokens. The value of the loss is that of all tokens.
            Models in which tokens attend in both directions, and those whose rows are sliced or moved, are compiled
            with one round, with a warning.
        report_loss: The value of the returned loss: "full", the loss of all tokens; "kept", that of the kept ones.
            ``None``: "full" if the scorer needs it anyway. The gradient is always that of the kept tokens.
        inner: The compiler of the rewritten graph: "inductor", "aot_eager" or "eager".
        logits: "keep" returns the logits of all tokens, without gradient if the model computes a loss; "drop" returns
            them with length 0 and never builds them.
        strict: Raise ``GraphNotSupported`` if the graph can't be rewritten, instead of compiling it without token
            selection.
        seed: Seed of a separate generator for the scorers' noise. ``None``: torch's default generator.
        mode: Inductor's ``mode``, as in ``torch.compile``.
        inductor_options: Inductor's options by name, as in ``torch.compile(options=...)``.

    Raises:
        ConfigError: a value is invalid, or an option has no effect.

    >>> Config(keep_ratio=0.25, scorer="strided").keep_ratio
    0.25
    """

    keep_ratio: float | Sequence[float] | None = 0.1
    keep_tokens: int | None = None
    scorer: str | Scorer = "loss"
    alpha: float = 1.0
    beta: float = 1.0
    attention_layers: str | Sequence[int] = "last"
    gradient_of: str = "last_block"
    select: str | None = None
    mix: float = 0.1
    weight_clip: float = 100.0
    labelled_first: float = 0.0
    keep_label: bool = True
    pinned: Sequence[int] = ()
    kv_grad: str = "selected"
    recompute: str | int | None = None
    kv: str = "keep"
    chunk_bytes: str | int | None = None
    memory_budget: str | int | None = None
    rounds: int = 1
    report_loss: str | None = None
    inner: str = "inductor"
    logits: str = "keep"
    strict: bool = False
    seed: int | None = None
    mode: str | None = None
    inductor_options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self._check_kept()
        for name, allowed in _CHOICES.items():
            _check_choice(name, getattr(self, name), allowed)
        for name, allowed in (("select", METHODS), ("report_loss", _REPORTS), ("mode", _MODES)):
            if getattr(self, name) is not None:
                _check_choice(name, getattr(self, name), allowed)
        _check_choice("kv", self.kv, tuple(KV_MODES))
        if not callable(self.scorer):
            _check_choice("scorer", self.scorer, tuple(scorer_names()))
        self._check_numbers()
        self._check_positions()
        if self.recompute is not None:
            _check_recompute(self.recompute)
        for name in ("memory_budget", "chunk_bytes"):
            if (amount := getattr(self, name)) is not None and (bytes_in(amount) or 0) < 1:
                raise ConfigError(f"{name}={amount!r}: expected bytes, as an integer or as text ('8GiB').")
        for name in ("strict", "keep_label"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected True or False.")
        if self.seed is not None and not _is_int(self.seed):
            raise ConfigError(f"seed={self.seed!r}: expected an integer or None.")
        self._check_inductor_options()
        self._check_effect()

    @classmethod
    def paper(cls, **options: Any) -> Config:
        """The recipe of the TokenSeek paper: loss over the 10 % of the tokens with the highest ``log I1 + minmax I2``.

        >>> Config.paper(logits="drop").select
        'topk'
        """
        recipe: dict[str, Any] = {
            "keep_ratio": 0.1,
            "scorer": "tokenseek",
            "alpha": 1.0,
            "beta": 1.0,
            "attention_layers": "last",
            "gradient_of": "last_block",
            "select": "topk",
            "labelled_first": 0.0,
            "keep_label": False,
            "kv_grad": "selected",
            "report_loss": "kept",
        }
        return cls(**{**recipe, **options})

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None = None, mode: str | None = None) -> Config:
        """A config from the ``options`` and ``mode`` of ``torch.compile``.

        Raises:
            ConfigError: an option is unknown or invalid, or ``options`` is not a mapping.
        """
        if not isinstance(options, Mapping | None):
            raise ConfigError(
                f"options is a {type(options).__name__}: expected a dict. Pass a Config as "
                "backend=tokenseek_fx.backend(config)."
            )
        options = dict(options or {})
        for name in options:
            if name not in (known := [field.name for field in fields(cls)]):
                raise ConfigError(f"Unknown option {name!r}.{_nearest(name, known)} Options are: {', '.join(known)}.")
        if mode is not None:
            options.setdefault("mode", mode)
        return cls(**options)

    @property
    def scoring(self) -> Scorer:
        """The scorer as a function, with ``alpha`` and ``beta`` set."""
        if not isinstance(self.scorer, str):
            return self.scorer
        return scorer_named(self.scorer, {"alpha": self.alpha, "beta": self.beta})

    def plan(
        self,
        given: Sequence[torch.Tensor] = (),
        is_fragment: bool = False,
        passed: Sequence[tuple[int, RowPlace]] = (),
    ) -> Plan:
        """What is done with a graph. ``given``, ``is_fragment``, ``passed``: as in ``passes.Plan``."""
        layers = self.attention_layers
        ratios = self.keep_ratio if isinstance(self.keep_ratio, Sequence) else (self.keep_ratio,)
        return Plan(
            selects=tuple(self._select(ratio) for ratio in ratios),
            signals=Signals(layers if isinstance(layers, str) else tuple(layers), self.gradient_of, tuple(self.pinned)),
            substitutes={name: scorer_named(name, {}) for name in ("attention", "gradient")},
            logits=self.logits,
            report_loss=self.report_loss,
            kv_grad=self.kv_grad,
            kv=KV_MODES[self.kv],
            chunk_bytes=bytes_in(self.chunk_bytes),
            recompute=bytes_in(self.recompute) or self.recompute,
            given=tuple(given),
            is_fragment=is_fragment,
            rounds=self.rounds,
            passed=tuple(passed),
            is_inductor=self.inner == "inductor",
            strict=self.strict,
        )

    def _select(self, ratio: float | None) -> Select:
        return Select(
            scorer=self.scoring,
            keep_ratio=ratio,
            keep_tokens=self.keep_tokens,
            method=self.select,
            mix=self.mix,
            weight_clip=self.weight_clip,
            labelled_first=self.labelled_first,
            keep_label=self.keep_label,
        )

    def _check_kept(self) -> None:
        ratio, count = self.keep_ratio, self.keep_tokens
        ratios = ratio if isinstance(ratio, (list, tuple)) and ratio else [ratio]
        if count is None:
            if not all(_is_number(r) and 0 < r <= 1 for r in ratios):
                raise ConfigError(f"keep_ratio={ratio!r}: expected a number with 0 < keep_ratio <= 1.")
        elif not _is_int(count) or count < 1:
            raise ConfigError(f"keep_tokens={count!r}: expected an integer of at least 1.")
        elif ratio not in (None, type(self).keep_ratio):
            raise ConfigError(f"keep_ratio={ratio!r} and keep_tokens={count!r}: set only one of them.")

    def _check_numbers(self) -> None:
        limits = {
            "alpha": (0, math.inf),
            "beta": (0, math.inf),
            "mix": (0, 1),
            "weight_clip": (1, math.inf),
            "labelled_first": (0, 1),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not _is_number(value) or not low <= value <= high or value == math.inf:
                limit = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
                raise ConfigError(f"{name}={value!r}: expected a number {limit}.")
        if not _is_int(self.rounds) or self.rounds < 1:
            raise ConfigError(f"rounds={self.rounds!r}: expected an integer of at least 1.")
        if self.alpha == self.beta == 0:
            raise ConfigError("alpha=0 and beta=0: the score has no terms; set one of them above 0.")

    def _check_positions(self) -> None:
        if isinstance(self.attention_layers, str):
            _check_choice("attention_layers", self.attention_layers, _LAYERS)
        elif not _are_ints(self.attention_layers) or not self.attention_layers:
            raise ConfigError(
                f"attention_layers={self.attention_layers!r}: expected 'last', 'first', 'all' or a list of numbers."
            )
        if isinstance(self.pinned, str) or not _are_ints(self.pinned):
            raise ConfigError(f"pinned={self.pinned!r}: expected a list of positions.")

    def _check_inductor_options(self) -> None:
        if self.inductor_options is None:
            return
        from torch._inductor import config

        known = list(config.get_config_copy())
        for name in self.inductor_options:
            if name.replace("-", "_") not in known:
                raise ConfigError(f"inductor_options: unknown Inductor option {name!r}.{_nearest(name, known)}")

    def _check_effect(self) -> None:
        """Raise ``ConfigError`` for an option that is set but has no effect."""
        given = {f.name for f in fields(self) if getattr(self, f.name) != f.default}
        for name, reason in self._without_effect(given):
            raise ConfigError(f"{name}={getattr(self, name)!r} has no effect: {reason}.")

    def _without_effect(self, given: set[str]) -> Iterator[tuple[str, str]]:
        """The set options that have no effect, and why."""
        if self.inner != "inductor":
            inductors = ("mode", "inductor_options", "memory_budget")
            yield from ((name, f"inner={self.inner!r}") for name in inductors if name in given)
        if self.inner == "eager":
            yield from ((name, "inner='eager'") for name in ("recompute", "kv") if name in given)
        if "kv" in given and self.kv_grad == "all":
            yield "kv", "kv_grad='all' saves the inputs of blocks and recomputes keys and values from them"
        for name in given & {"alpha", "beta"}:
            if name not in self._factors():
                yield name, f"the scorer has no {name}"
        if self.rounds > 1:
            if self.report_loss == "kept":
                yield "report_loss", "with rounds, the forward computes the loss of all tokens"
            if self.kv_grad == "all":
                yield "rounds", "kv_grad='all' trains keys and values of all tokens, so rounds would not be exact"
            if self.kv in ("fp8", "offload"):
                yield "kv", "rounds read keys and values as they are until the last of them"
            if self.mode in _WITH_CUDA_GRAPHS:
                yield "mode", "rounds run several times in one backward, which CUDA graphs don't record"
        if "attention_layers" in given and not needs_of(self.scoring) - {"noise"}:
            yield "attention_layers", "the scorer needs no attention"
        if "gradient_of" in given and not needs_of(self.scoring) & {"gradient", "loss"}:
            yield "gradient_of", "the scorer needs no gradient"
        for name in given & {"mix", "weight_clip"}:
            if (self.select or method_of(self.scoring)) != "sample":
                yield name, "no tokens are drawn (select='topk')"

    def _factors(self) -> Collection[str]:
        return parameters_of(self.scorer) if isinstance(self.scorer, str) else ()


def bytes_in(amount: Any) -> int | None:
    """A number of bytes, from an integer or from text with a unit; ``None`` for anything else.

    >>> bytes_in("1.5GiB"), bytes_in(64), bytes_in("64")
    (1610612736, 64, None)
    """
    if isinstance(amount, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]iB)", amount)
        return int(float(match[1]) * _UNITS[match[2]]) if match else None
    return amount if _is_int(amount) else None


def _check_recompute(value: Any) -> None:
    budget = bytes_in(value)
    if value not in _RECOMPUTE and (budget is None or budget < 1):
        raise ConfigError(f"recompute={value!r}: expected 'none', 'rows', or bytes as an integer or as text ('64MiB').")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _are_ints(values: Any) -> bool:
    return isinstance(values, Sequence) and all(map(_is_int, values))


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(
            f"{name}={value!r}: expected one of {', '.join(map(repr, allowed))}.{_nearest(value, allowed)}"
        )


def _nearest(name: Any, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the most similar known name."""
    match = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {match[0]!r}?" if match else ""
