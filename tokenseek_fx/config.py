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
_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Config:
    """Options of ``torch.compile(model, backend="tokenseek", options={...})``; bad ones raise ``ConfigError``.

    Args:
        keep_ratio: share of the tokens of every sequence that are trained on, 0 < r <= 1; k = ceil(keep_ratio * T). A list
            gives one for every token axis, first that of the loss (of an encoder-decoder: decoder, encoder).
        keep_tokens: the number k itself, instead of ``keep_ratio`` (all tokens where a sequence is shorter).
        scorer: a scorer's name (default chosen by the study in docs/when-to-use.md), or a function ``ScoreInputs -> scores [B, T]``.
        alpha: factor in TokenSeek's score ``alpha log(attention received) + beta minmax(gradient)``.
        beta: factor of the gradient in it.
        attention_layers: the attentions that count: "last", "first", "all", or a list of numbers (negative: from the end).
        gradient_of: where the gradient is taken: "last_block" (its input) or "head" (the input of the head; cheaper).
        select: "topk" keeps the highest scores; "sample" draws with probability by score and weights the loss by inverse
            inclusion probability, so that its expectation is the full loss; ``None``: what the scorer's scores are made for,
            "sample" for "loss" and "gradient", "topk" for the others and where no loss is one over tokens.
        mix: share of the draw that is uniform over labelled tokens ("sample"), 0 <= mix <= 1.
        weight_clip: the largest weight of a drawn token ("sample"), at least 1.
        labelled_first: share of the kept tokens that labelled tokens get first, 0 to 1.
        keep_label: where no kept token of a sequence has a label, the best labelled one replaces the worst.
        pinned: positions that are always kept (negative: from the end). Those that a classification head reads are
            found by themselves.
        kv_grad: "selected" cuts keys and values of the other tokens; "all" keeps their own projections live (costs the
            input of every block).
        recompute: what of the kept rows is computed again in backward: "none"; "rows", everything but the rows that enter each
            block and the head (costs one more forward of the kept rows); or bytes to save at most, a number or "64MiB":
            as many blocks are computed again as that takes. ``None``: what ``memory_budget`` asks for, else "rows" for all blocks
            but the last ones that fit into ``3 * chunk_bytes``, where the forward of all tokens goes in chunks and so holds as
            much for a moment (less where the gradient of the head's weight takes more than a chunk).
        kv: keys and values of all tokens until the backward: "keep"; "recompute", they are made again, in the forward of the kept
            rows and in their backward, from what takes fewer bytes, where there is that (the input of a block, for as many key
            heads as query heads); "offload", in pinned host memory (on a GPU); "fp8", in 8 bits (the loss is exact, the gradient
            approximate).
        chunk_bytes: what a value that the forward of all tokens makes on its way may take, a number or "32MiB": it goes through a
            block's projections and MLP in chunks of so many tokens. ``None``: 12 MiB on a CPU, 256 MiB on a GPU.
        memory_budget: what forward and backward may hold beside parameters, gradients and optimizer states that are there
            before, in bytes or as "8GiB": what it takes of ``recompute``, ``chunk_bytes`` and ``kv`` is chosen at compile time,
            by estimates.
        report_loss: "full" returns the loss of all tokens, "kept" that of the kept ones; ``None``: the full one where the
            scores need it anyway. The gradient is that of the kept tokens.
        inner: what compiles the rewritten graph: "inductor", "aot_eager" or "eager".
        logits: "keep" returns the logits of all tokens (without gradient) beside the loss; "drop" returns them with length 0 and
            never builds them.
        strict: raise ``GraphNotSupported`` where the model can't be rewritten, instead of compiling it as it is.
        seed: seed of the scorer's noise, apart from torch's generator (None: torch's own generator).
        mode: Inductor's mode, as for ``torch.compile``.
        inductor_options: Inductor's options, as for ``torch.compile(options=...)``.

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
                raise ConfigError(f"{name}={amount!r}: expected bytes, as a number or as text ('8GiB').")
        for name in ("strict", "keep_label"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected True or False.")
        if self.seed is not None and not _is_int(self.seed):
            raise ConfigError(f"seed={self.seed!r}: expected an integer or None.")
        self._check_inductor_options()
        self._check_effect()

    @classmethod
    def paper(cls, **options: Any) -> Config:
        """The recipe of the TokenSeek paper: the 10 % of the tokens with the highest ``log I1 + minmax I2``, loss over them.

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
        """A config from the ``options`` and ``mode`` of ``torch.compile``."""
        if not isinstance(options, Mapping | None):
            raise ConfigError(
                f"options is a {type(options).__name__}: expected a dict. A Config goes to backend=tokenseek_fx.backend(config)."
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
        """The scorer itself."""
        if not isinstance(self.scorer, str):
            return self.scorer
        return scorer_named(self.scorer, {"alpha": self.alpha, "beta": self.beta})

    def plan(
        self,
        given: Sequence[torch.Tensor] = (),
        is_fragment: bool = False,
        passed: Sequence[tuple[int, RowPlace]] = (),
    ) -> Plan:
        """What is done with a graph (``passes.Plan``). ``given``, ``is_fragment``, ``passed``: as there."""
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
            raise ConfigError(f"keep_ratio={ratio!r} and keep_tokens={count!r}: give one of them.")

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
        if self.alpha == self.beta == 0:
            raise ConfigError("alpha=0 and beta=0: nothing is left of the score; give one of them.")

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
        """An option that is given but that nothing reads is a mistake."""
        given = {f.name for f in fields(self) if getattr(self, f.name) != f.default}
        for name, reason in self._without_effect(given):
            raise ConfigError(f"{name}={getattr(self, name)!r} has no effect: {reason}.")

    def _without_effect(self, given: set[str]) -> Iterator[tuple[str, str]]:
        """Those of the given options that have no effect, and why."""
        if self.inner != "inductor":
            inductors = ("mode", "inductor_options", "memory_budget")
            yield from ((name, f"inner={self.inner!r}") for name in inductors if name in given)
        if self.inner == "eager":
            yield from ((name, "inner='eager'") for name in ("recompute", "kv") if name in given)
        if "kv" in given and self.kv_grad == "all":
            yield "kv", "kv_grad='all' keeps the inputs of blocks and makes keys and values of them"
        for name in given & {"alpha", "beta"}:
            if name not in self._factors():
                yield name, f"the scorer has no {name}"
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
    """A number of bytes, given as such or as text with a unit; ``None`` for anything else.

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
        raise ConfigError(f"recompute={value!r}: expected 'none', 'rows', or bytes as a number or as text ('64MiB').")


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
