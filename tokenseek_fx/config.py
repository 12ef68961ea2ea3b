"""The options of the backend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from .passes.errors import TokenSeekError
from .passes.select import Scorer
from .scorers import SCORERS, scorer_named

_INNER = ("inductor", "aot_eager", "eager")
_LOGITS = ("keep", "drop")
_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


class ConfigError(TokenSeekError, ValueError):
    """An unknown or bad option."""


@dataclass(frozen=True)
class Config:
    """Options of ``torch.compile(model, backend="tokenseek", options={...})``; bad ones raise ``ConfigError``.

    Args:
        keep_ratio: share of the tokens of every sequence that are trained on, 0 < r <= 1; k = ceil(keep_ratio * T).
        keep_tokens: the number k itself, instead of ``keep_ratio`` (all tokens where a sequence is shorter).
        scorer: a scorer's name, or a function ``ScoreInputs -> scores [B, T]``; the highest scores are kept.
        inner: what compiles the rewritten graph: "inductor", "aot_eager" or "eager".
        logits: "keep" returns the logits of all tokens (detached) beside the loss; "drop" returns them with length 0 and
            never builds them.
        strict: raise ``GraphNotSupported`` where the model can't be rewritten, instead of compiling it as it is.
        seed: seed of the scorer's noise, apart from torch's generator (None: torch's own generator).
        mode: Inductor's mode, as for ``torch.compile``.
        inductor_options: Inductor's options, as for ``torch.compile(options=...)``.

    >>> Config(keep_ratio=0.25, scorer="strided").keep_ratio
    0.25
    """

    keep_ratio: float | None = 0.1
    keep_tokens: int | None = None
    scorer: str | Scorer = "random"
    inner: str = "inductor"
    logits: str = "keep"
    strict: bool = False
    seed: int | None = None
    mode: str | None = None
    inductor_options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self._check_kept()
        _check_choice("inner", self.inner, _INNER)
        _check_choice("logits", self.logits, _LOGITS)
        if self.mode is not None:
            _check_choice("mode", self.mode, _MODES)
        if not callable(self.scorer):
            _check_choice("scorer", self.scorer, tuple(SCORERS))
        if not isinstance(self.strict, bool):
            raise ConfigError(f"strict={self.strict!r}: expected True or False.")
        if self.seed is not None and not _is_int(self.seed):
            raise ConfigError(f"seed={self.seed!r}: expected an integer or None.")
        self._check_inductor_options()

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None = None, mode: str | None = None) -> Config:
        """A config from the ``options`` and ``mode`` of ``torch.compile``."""
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
        return scorer_named(self.scorer) if isinstance(self.scorer, str) else self.scorer

    def _check_kept(self) -> None:
        ratio, count = self.keep_ratio, self.keep_tokens
        if count is None:
            if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
                raise ConfigError(f"keep_ratio={ratio!r}: expected a number with 0 < keep_ratio <= 1.")
        elif not _is_int(count) or count < 1:
            raise ConfigError(f"keep_tokens={count!r}: expected an integer of at least 1.")
        elif ratio not in (None, type(self).keep_ratio):
            raise ConfigError(f"keep_ratio={ratio!r} and keep_tokens={count!r}: give one of them.")

    def _check_inductor_options(self) -> None:
        if self.inductor_options is None:
            return
        from torch._inductor import config

        known = list(config.get_config_copy())
        for name in self.inductor_options:
            if name.replace("-", "_") not in known:
                raise ConfigError(f"inductor_options: unknown Inductor option {name!r}.{_nearest(name, known)}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(
            f"{name}={value!r}: expected one of {', '.join(map(repr, allowed))}.{_nearest(value, allowed)}"
        )


def _nearest(name: Any, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the most similar known name."""
    match = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {match[0]!r}?" if match else ""
