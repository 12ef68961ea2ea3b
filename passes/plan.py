"""Plan: what is done with a graph, resolved once from the user's options (``tokenseek_fx.Config.plan``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .analysis.row_index import example_sizes
from .analysis.token_axes import RowPlace, TokenAxes
from .graph.factors import same_size
from .graph.program import Program
from .keep.kv_modes import KEEP, KVMode
from .streams.select import Scorer, Select
from .streams.signals import Signals


@dataclass(frozen=True)
class Plan:
    """What ``training(plan)`` does.

    Args:
        selects: how tokens are scored and chosen, one for each token axis; the last one also applies to further axes.
        signals: the signals that scores are computed from.
        substitutes: the scorers "attention" and "gradient" by name, used where tokens have no loss; empty: no
            substitution.
        logits: "keep" returns the logits in full, "drop" returns them with length 0.
        report_loss: "full" returns the value of the loss of all tokens (with the gradient of the kept ones), "kept"
            that of the kept ones; ``None``: the full one if the signals need it anyway.
        kv_grad: "selected" detaches keys and values of tokens that are not kept, "all" keeps their own projections
            live.
        kv: how keys and values are kept for backward.
        chunk_bytes: bytes that an intermediate value of the prefill may take; ``None``: the default of the device.
        recompute: segments that backward recomputes: "none", "rows" (all), the bytes that may be saved, or ``None``
            (all except the last ones that fit into the memory of the chunked prefill).
        given: examples of row indices int64 [B, k] (and their weights float [B, k]) that are inputs of the rewritten
            graph; nothing is chosen.
        is_fragment: the graph is a fragment of a model; all its outputs stay live in the kept rows.
        passed: batch dim (``None``: one instance) and token dim of inputs, by position, known from another fragment.
        is_inductor: Inductor compiles the result.
        rounds: the kept rows are run in this many rounds in backward (``streams/rounds.py``); 1: in the forward.
        strict: an option without effect on the graph is an error instead of a warning.

    >>> from tokenseek_fx.scorers import strided
    >>> Plan((Select(strided(), keep_ratio=0.25),)).kv.name
    'keep'
    """

    selects: tuple[Select, ...]
    signals: Signals = field(default_factory=Signals)
    substitutes: Mapping[str, Scorer] = field(default_factory=dict)
    logits: str = "keep"
    report_loss: str | None = None
    kv_grad: str = "selected"
    kv: KVMode = KEEP
    chunk_bytes: int | None = None
    recompute: str | int | None = None
    given: tuple[Tensor, ...] = ()
    is_fragment: bool = False
    passed: tuple[tuple[int, RowPlace], ...] = ()
    is_inductor: bool = False
    rounds: int = 1
    strict: bool = True

    def keeps_all(self, program: Program) -> bool:
        """True if every token is kept and no option changes the result, so that the plain graph can be compiled."""
        axes = enumerate(program[TokenAxes].tokens)
        lengths = {i: example_sizes(program, axis)[1] for i, axis in axes}
        return (
            self.logits == "keep"
            and self.rounds == 1
            and all(same_size(self.select_of(i).kept(n), n) for i, n in lengths.items())
        )

    def select_of(self, axis: int) -> Select:
        """How the tokens of an axis are chosen, by its number."""
        return self.selects[min(axis, len(self.selects) - 1)]
