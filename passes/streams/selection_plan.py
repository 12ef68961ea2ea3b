"""Selection plan: how the rows of every token axis are chosen, given the losses and token axes of the graph."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...warnings import TokenSeekWarning
from ..analysis.activity import Activity
from ..analysis.losses import refuse_unweighted, weighted_losses
from ..analysis.row_index import example_sizes
from ..analysis.token_axes import TokenAxes, TokenAxis
from ..graph.errors import GraphNotSupported, tell_no_effect
from ..graph.factors import same_size
from ..graph.nodes import hint
from ..graph.program import Program
from .scoring_tail import has_token_loss
from .select import SIGNALS, ScoreInputs, Scorer, Select, method_of, needs_of
from .signals import Signals


@dataclass(frozen=True)
class Selections:
    """How the tokens of every axis are chosen, the axis of the loss first."""

    by_axis: Mapping[TokenAxis, Select]

    @property
    def needs(self) -> frozenset[str]:
        """The signals that are needed on any axis."""
        return frozenset().union(*(select.needs for select in self.by_axis.values()))

    @property
    def noisy(self) -> tuple[int, ...]:
        """The numbers of the token axes whose selection needs noise."""
        return tuple(i for i, select in enumerate(self.by_axis.values()) if "noise" in select.needs)


def _alike(inputs: ScoreInputs) -> Tensor:
    """The scores of tokens that are all kept."""
    return torch.ones(inputs.batch, inputs.tokens, device=inputs.device)


@dataclass(frozen=True)
class PlanSelection:
    """Resolve the scorer and the selection method of every token axis.

    Reads ``TokenAxes``, ``Activity``; writes ``Selections``. Warns about options that have no effect on this graph.

    Args:
        selects: one for each token axis; the last one also applies to further axes. ``method`` ``None``: the one that
            the scorer's scores are made for.
        signals, logits, report_loss: as in ``Plan``.
        substitutes: the scorers "attention" and "gradient", used where tokens have no loss; without them, a scorer that
            requests a missing signal fails when it is traced.
        given: rows are given: nothing is chosen, and there are no warnings.
        strict: an option without effect is an error instead of a warning.

    Raises:
        GraphNotSupported: drawn tokens have no loss to be weighted in; or, if ``strict``, an option has no effect.
    """

    selects: tuple[Select, ...]
    signals: Signals = field(default_factory=Signals)
    logits: str = "keep"
    report_loss: str | None = None
    substitutes: Mapping[str, Scorer] = field(default_factory=dict)
    given: bool = False
    strict: bool = True
    name: str = "selection plan"

    def run(self, program: Program) -> Program:
        if not self.given:
            tell_no_effect(self._without_use(program), self.strict)
        chosen = Selections({axis: self._select(program, i, axis) for i, axis in enumerate(program[TokenAxes].tokens)})
        if not self.given and chosen.by_axis[program[TokenAxes].main].method == "sample":
            refuse_unweighted(program)
        return program.with_(chosen)

    def check(self, program: Program) -> None:
        """Every axis has a selection with a method."""
        assert all(select.method is not None for select in program[Selections].by_axis.values())

    def _of(self, number: int) -> Select:
        return self.selects[min(number, len(self.selects) - 1)]

    def _select(self, program: Program, number: int, axis: TokenAxis) -> Select:
        """The selection of an axis.

        Tokens of a further axis have no loss to be weighted in, so their scores are ranks.
        """
        select, tokens = self._of(number), example_sizes(program, axis)[1]
        if same_size(select.kept(tokens), tokens):  # in rounds, or with an option that changes the result
            return replace(select, scorer=_alike, method="topk", labelled_first=0.0, keep_label=False)
        scorer = select.scorer if self.given else self._scorer(program, select.scorer, axis)
        weighted = number == 0 and weighted_losses(program)
        method = select.method if number == 0 else None
        return replace(select, scorer=scorer, method=method or (method_of(scorer) if weighted else "topk"))

    def _scorer(self, program: Program, scorer: Scorer, axis: TokenAxis) -> Scorer:
        """The scorer or its substitute: gradient if tokens have no loss, attention if they have no gradient either."""
        wanted = sorted(name for name in needs_of(scorer) if SIGNALS[name].tail is not None)
        if not self.substitutes:
            return scorer
        if axis != program[TokenAxes].main:
            there = "loss" not in wanted and self.signals.has_gradient(program, axis) if wanted else True
            return scorer if there else self.substitutes["attention"]
        if not program[Activity].losses and wanted:
            fact = f"The graph has no loss, so the scorer lacks signals: {', '.join(wanted)}."
            if self.strict:
                raise GraphNotSupported(fact, 'Compute the loss inside the model, or choose scorer="attention".')
            return self._instead(fact, "attention")
        if "loss" in wanted and not has_token_loss(program):
            return self._instead(
                "The loss is not one over all tokens in order, so a token has no loss of its own.", "gradient"
            )
        return scorer

    def _instead(self, fact: str, name: str) -> Scorer:
        warnings.warn(f"tokenseek: {fact} Tokens are scored by {name} instead.", TokenSeekWarning, stacklevel=2)
        return self.substitutes[name]

    def _without_use(self, program: Program) -> Iterator[tuple[str, str]]:
        """A fact and a remedy for every option without effect.

        They depend on the losses, the token axes and the length of the example.
        """
        losses, axes = program[Activity].losses, program[TokenAxes].tokens
        for name, chosen in {"logits": self.logits == "drop", "report_loss": self.report_loss is not None}.items():
            if chosen and not losses:
                option = f"{name}={getattr(self, name)!r}"
                yield f"The graph has no loss, so {option} has no effect.", "Compute the loss inside the model."
        if len(self.selects) > len(axes):
            ratios = [select.keep_ratio for select in self.selects]
            yield f"keep_ratio={ratios}: token axes of the model: {len(axes)}.", "Give one ratio for each."
        pinned, tokens = self.signals.pinned, hint(example_sizes(program, axes[0])[1])
        if missing := [i for i in pinned if not -tokens <= i < tokens]:
            fact = f"pinned={missing}: no such position; tokens in a sequence: {tokens}."
            yield fact, "Number them from 0, or from -1 at the end."
        kept, there = self._of(0).kept(tokens), {i % tokens for i in pinned if -tokens <= i < tokens}
        if len(there) > kept:
            yield f"pinned={list(pinned)}: not all can be kept; kept tokens: {kept}.", "Keep more, or pin fewer."
