"""Select: score the tokens, and return the sorted indices (and weights) of the kept rows of every instance.

There are two methods to choose k rows (``Select.method``):

- ``"topk"`` (TokenSeek): the rows with the highest scores.
- ``"sample"``: k rows drawn without replacement, with probability by score, by the Gumbel top-k trick: the k largest
  keys ``log p + G`` with ``p = (1 - mix) softmax(score) + mix / #labelled``. A kept row is weighted by ``1 / pi`` with
  ``pi = P(key > kappa) = 1 - exp(-p exp(-kappa))``, where kappa is the threshold that its key had to pass given all
  other keys. The weighted loss is unbiased (Kool et al. 2019, "Stochastic beams and where to find them", section 4.1;
  priority sampling).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..graph.errors import ConfigError
from ..graph.registry import Registry

#: ``scorer(inputs) -> scores [B, T]``
Scorer = Callable[["ScoreInputs"], Tensor]
#: The signals that a scorer can request with ``needs``, by name (``signals.py``).
SIGNALS: Registry[Any] = Registry("signal")
#: The methods to choose rows.
METHODS = ("topk", "sample")
_TRACED = (
    "It is called once, on tensors without values: signals that it doesn't request with tokenseek_fx.needs are None, "
    "it can't branch on a value, and it must create its own tensors."
)
_EXPECTED = "Expected float scores [B, T] = [inputs.batch, inputs.tokens] on inputs.device."
_FIELDS = ("attention", "gradient", "loss", "noise")
_PINNED, _RESERVED, _TOKEN, _PADDING = 3, 2, 1, 0


@dataclass(frozen=True)
class ScoreInputs:
    """What a scorer reads: ``batch`` instances of ``tokens`` tokens, of which ``kept`` will be kept.

    All tensors are [B, T]. A signal is ``None`` unless the scorer requests it with ``needs``.

    Args:
        batch: the number of instances.
        tokens: the number of tokens per instance.
        device: the device of all tensors.
        kept: the number of tokens to keep per instance.
        noise: signal; float32, uniform in [0, 1).
        attention: signal; attention that a token receives, summed over queries and heads (TokenSeek's I1).
        gradient: signal; sum over the hidden dim of the loss's absolute gradient at the token (TokenSeek's I2).
        loss: signal; loss of the token, 0 without a label.
        labelled: bool, the token has a label; ``None``: all tokens.
        attended: bool, the token is not padding; ``None``: all tokens.
        pinned: bool, the token is always kept; ``None``: none.
        further: signals registered outside this package, by name.
    """

    batch: Any
    tokens: Any
    device: torch.device
    kept: Any = None
    noise: Tensor | None = None
    attention: Tensor | None = None
    gradient: Tensor | None = None
    loss: Tensor | None = None
    labelled: Tensor | None = None
    attended: Tensor | None = None
    pinned: Tensor | None = None
    further: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, signal: str) -> Tensor:
        """A signal by its name.

        Raises:
            KeyError: the signal was not requested with ``needs``.
        """
        found = self.further.get(signal, getattr(self, signal, None) if signal in _FIELDS else None)
        if found is None:
            raise KeyError(f"The signal {signal!r} was not requested. Decorate the scorer with @needs({signal!r}).")
        return found

    def with_signals(self, signals: Mapping[str, Tensor | None]) -> ScoreInputs:
        """A copy with these signals; those of this package are fields."""
        own = {name: x for name, x in signals.items() if name in _FIELDS}
        further = {name: x for name, x in signals.items() if name not in _FIELDS and x is not None}
        return replace(self, **own, further={**self.further, **further})

    def mask(self, name: str) -> Tensor:
        """A bool field [B, T]; all True (``pinned``: all False) if it is ``None``."""
        found = getattr(self, name)
        if found is not None:
            return found
        return torch.full((self.batch, self.tokens), name != "pinned", dtype=torch.bool, device=self.device)


class Selected(NamedTuple):
    """The selection of one token axis.

    Args:
        scores: float [B, T], -inf for padding.
        indices: int64 [B, k], sorted.
        weights: float [B, k], the weights of the kept rows in the loss; ``None``: all 1.
    """

    scores: Tensor
    indices: Tensor
    weights: Tensor | None = None


def needs(*signals: str, select: str = "topk") -> Callable[[Scorer], Scorer]:
    """Declare the signals that a scorer reads; no other signal is computed for it.

    Args:
        signals: names of registered signals.
        select: the method that the scores are made for: "topk" (ranks) or "sample" (log-probabilities).

    Raises:
        ValueError: a signal or the method does not exist.

    >>> @needs("attention")
    ... def score(inputs):
    ...     return inputs.attention
    """
    if any(map(callable, signals)):
        raise ValueError('needs takes the names of signals: write @needs("loss"), or @needs() for none.')
    if unknown := set(signals) - set(SIGNALS):
        raise ValueError(f"needs: unknown signal {', '.join(sorted(unknown))}. Choose from: {', '.join(SIGNALS)}.")
    if select not in METHODS:
        raise ValueError(f"select={select!r}: expected one of {', '.join(map(repr, METHODS))}.")

    def state(scorer: Scorer) -> Scorer:
        scorer.needs, scorer.select = frozenset(signals), select  # type: ignore[attr-defined]
        return scorer

    return state


def _unlike_scores(scores: Any, inputs: ScoreInputs) -> str:
    """What a scorer returned, if it is not a float tensor [B, T]; "" if it is."""
    if not isinstance(scores, Tensor):
        return f"no tensor ({type(scores).__name__})"
    shape = [inputs.batch, inputs.tokens]
    if scores.ndim != 2 or any(statically_known_true(a != b) for a, b in zip(scores.shape, shape, strict=True)):
        return f"scores of shape {list(scores.shape)} for [B, T] = {shape}"
    if not scores.is_floating_point():
        return f"scores of {scores.dtype}"
    return f"scores on {scores.device}" if scores.device != inputs.device else ""


def needs_of(scorer: Scorer) -> frozenset[str]:
    """The signals that a scorer declared with ``needs``."""
    return getattr(scorer, "needs", frozenset())


def method_of(scorer: Scorer) -> str:
    """The selection method that a scorer declared with ``needs``."""
    return getattr(scorer, "select", "topk")


def kept_tokens(tokens: Any, keep_ratio: float | None = None, keep: int | None = None) -> Any:
    """k = ceil(keep_ratio * T), exact for the decimal that the user wrote, or ``keep`` if T is larger.

    >>> kept_tokens(1024, 0.1), kept_tokens(100, 0.07), kept_tokens(8, keep=16)
    (103, 7, 8)
    """
    if keep is not None:
        return torch.sym_min(keep, tokens)
    ratio = Fraction(repr(float(keep_ratio)))
    return (tokens * ratio.numerator + ratio.denominator - 1) // ratio.denominator


@dataclass(frozen=True)
class Select:
    """How scores become rows.

    Pinned tokens come before all others, padding after all others. Noise decides between equal scores; for a scorer
    that reads no signal, the position does.

    Args:
        scorer: ``scorer(inputs) -> scores [B, T]``.
        keep_ratio: share of the tokens to keep.
        keep_tokens: number of tokens to keep, in place of ``keep_ratio``.
        method: "topk" or "sample"; ``None``: not resolved yet.
        mix: share of the uniform distribution in the probabilities of "sample".
        weight_clip: largest weight of "sample".
        labelled_first: share of the k rows that go to labelled tokens first.
        keep_label: keep at least one labelled token if there is one.
    """

    scorer: Scorer
    keep_ratio: float | None = 0.1
    keep_tokens: int | None = None
    method: str | None = "topk"
    mix: float = 0.1
    weight_clip: float = 100.0
    labelled_first: float = 0.0
    keep_label: bool = True

    @property
    def needs(self) -> frozenset[str]:
        """The signals to compute for this selection.

        Noise decides between equal scores, so that no position is preferred; scorers of positions alone need none.
        """
        wanted = needs_of(self.scorer)
        return wanted | {"noise"} if wanted or self.method == "sample" else wanted

    def kept(self, tokens: Any) -> Any:
        """k, the number of rows to keep of this many tokens."""
        return kept_tokens(tokens, self.keep_ratio, self.keep_tokens)

    def __call__(self, inputs: ScoreInputs) -> Selected:
        """Score and choose. The scorer reads ``noise`` only for "topk", since the draw of "sample" is random itself.

        Raises:
            ConfigError: the scorer fails, or returns no float scores [B, T].
        """
        inputs = replace(inputs, kept=self.kept(inputs.tokens))
        sampled = self.method == "sample"
        reads_noise = "noise" in needs_of(self.scorer) and not sampled
        scores = self._scores(inputs if reads_noise else replace(inputs, noise=None))
        scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        scores = scores.masked_fill(~inputs.mask("attended"), -torch.inf)
        if not sampled:
            order, _ = self._order(scores, inputs)
            return Selected(scores, order[:, : inputs.kept].sort(-1).values)
        chances = self._log_chances(scores, inputs)
        assert inputs.noise is not None
        keys = chances - torch.log(-torch.log(inputs.noise))
        order, levels = self._order(keys, inputs)
        indices = order[:, : inputs.kept].sort(-1).values
        weights = self._weights(chances, keys, order, levels, inputs).gather(1, indices)
        return Selected(scores, indices, weights)

    def _scores(self, inputs: ScoreInputs) -> Tensor:
        """The scores, checked."""
        try:
            scores = self.scorer(inputs)
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error) else repr(error)
            raise ConfigError(f"The scorer failed ({reason}). {_TRACED}") from error
        if wrong := _unlike_scores(scores, inputs):
            raise ConfigError(f"The scorer returned {wrong}. {_EXPECTED}")
        return scores

    def _log_chances(self, scores: Tensor, inputs: ScoreInputs) -> Tensor:
        """log p of the draw, up to a constant; -inf for padding."""
        fair = inputs.mask("labelled") & inputs.mask("attended")
        fair = torch.where(fair.any(-1, keepdim=True), fair, inputs.mask("attended"))
        uniform = fair.to(scores.dtype) / fair.sum(-1, keepdim=True).clamp(min=1)
        chosen = torch.softmax(scores, -1).nan_to_num(nan=0.0)
        return torch.log((1 - self.mix) * chosen + self.mix * uniform)

    def _order(self, keys: Tensor, inputs: ScoreInputs) -> tuple[Tensor, Tensor]:
        """Positions in the order of choice, and the level of each.

        Levels are pinned, reserved for labels, token, padding; within a level the order is by key, then by noise.
        """
        order = inputs.noise.argsort(dim=-1, descending=True) if inputs.noise is not None else None
        keys = keys if order is None else keys.gather(1, order)
        by_key = keys.sort(dim=-1, descending=True, stable=True).indices
        order = by_key if order is None else order.gather(1, by_key)
        pinned, attended, labelled = (inputs.mask(name).gather(1, order) for name in ("pinned", "attended", "labelled"))
        levels = torch.where(pinned, _PINNED, torch.where(attended, _TOKEN, _PADDING))
        if inputs.labelled is not None:
            free = labelled & (levels == _TOKEN)
            levels = torch.where(free & (free.cumsum(-1) <= self._reserved(pinned, inputs.kept)), _RESERVED, levels)
        levels, again = levels.sort(dim=-1, descending=True, stable=True)
        return order.gather(1, again), levels

    def _reserved(self, pinned: Tensor, kept: Any) -> Tensor:
        """The number of rows reserved for labelled tokens, [B, 1]."""
        pins = pinned.sum(-1, keepdim=True)
        share = (kept_tokens(kept, self.labelled_first) - pins).clamp(min=int(self.keep_label))
        return torch.minimum(share, (kept - pins).clamp(min=0))

    def _weights(self, chances: Tensor, keys: Tensor, order: Tensor, levels: Tensor, inputs: ScoreInputs) -> Tensor:
        """1 / pi for labelled tokens that are drawn, at most ``weight_clip``; 1 for the rest."""
        labelled = inputs.mask("labelled")
        kappa = self._threshold(keys.gather(1, order), levels, labelled.gather(1, order), inputs.kept)
        chance = -torch.expm1(-torch.exp(chances - kappa))
        chance = torch.where(torch.isneginf(kappa), 1.0, chance)
        drawn = labelled & ~inputs.mask("pinned")
        return torch.where(drawn, (1 / chance).clamp(max=self.weight_clip), 1.0)

    def _threshold(self, keys: Tensor, levels: Tensor, labelled: Tensor, kept: Any) -> Tensor:
        """The key below which a kept labelled token would not have been kept, [B, 1]; arguments are in order of choice.

        It is the best key left out. Only if all kept labelled tokens have reserved rows, they compete among themselves,
        and it is the best labelled key left out. -inf: every token is kept anyway.
        """
        nothing = torch.full_like(keys[:, :1], -torch.inf)
        left_out = torch.cat([keys.masked_fill(levels == _PADDING, -torch.inf)[:, kept:], nothing], -1)
        their_labels = torch.cat([labelled[:, kept:], torch.ones_like(labelled[:, :1])], -1)
        best = left_out.amax(-1, keepdim=True)
        best_labelled = left_out.masked_fill(~their_labels, -torch.inf).amax(-1, keepdim=True)
        open_to_all = (labelled & (levels == _TOKEN))[:, :kept].any(-1, keepdim=True)
        return torch.where(open_to_all, best, best_labelled)
