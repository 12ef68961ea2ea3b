"""Recompute plan: of how many segments backward recomputes the forward."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import fx

from ...ops.attention import is_selected_attention
from ..graph.errors import ConfigError
from ..graph.nodes import bytes_hint
from ..graph.op_sets import MATMULS
from ..graph.program import Program
from ..keep.kv_modes import KEEP, KVMode
from ..lower.chunks import ChunkedPrefill
from ..lower.split import Segment, Segments
from ..rules.attention import attention_op
from ..streams.rounds import Rounds
from .saved import SavedTensors


@dataclass(frozen=True)
class RecomputePlan:
    """Backward recomputes the first ``segments`` of ``of`` segments."""

    segments: int
    of: int

    @property
    def share(self) -> float:
        """The share of the segments that is recomputed."""
        return self.segments / self.of


@dataclass(frozen=True)
class PlanRecompute:
    """Choose the segments that backward recomputes.

    Reads ``Segments``, ``ChunkedPrefill``, ``Rounds``; writes ``RecomputePlan``, ``SavedTensors``. The first segments
    are recomputed, since their values are held longest.

    Args:
        recompute: "none", "rows" (all segments), or the bytes that may be saved. ``None``: all segments except the last
            ones whose matrix products and attentions fit into the spare bytes of the chunked prefill; in rounds none,
            since more rounds save as much and compute nothing again.
        kv: the keys/values mode.

    Raises:
        ConfigError: more bytes are saved even if every segment is recomputed.
    """

    recompute: str | int | None = None
    kv: KVMode = KEEP
    name: str = "recompute plan"

    def run(self, program: Program) -> Program:
        segments, spare = program[Segments], program[ChunkedPrefill].spare_bytes
        saved, by_rounds = SavedTensors(segments, self.kv), bool(program[Rounds].phases) and self.recompute is None
        count = 0 if by_rounds else self._count(saved, spare)
        return program.with_(RecomputePlan(count, len(segments.segments)), saved)

    def check(self, program: Program) -> None:
        """No more segments are recomputed than there are."""
        plan = program[RecomputePlan]
        assert 0 <= plan.segments <= plan.of

    def _count(self, saved: SavedTensors, spare_bytes: int) -> int:
        every = len(saved.segments.segments)
        if self.recompute is None:
            return every - _fitting(saved.segments.segments[1:], spare_bytes)
        if isinstance(self.recompute, str):
            return every if self.recompute == "rows" else 0
        key = lambda count: -saved.if_recomputed(count).bytes  # noqa: E731
        count = bisect_left(range(every + 1), -self.recompute, key=key)
        if count > every:
            raise ConfigError(
                f"recompute={self.recompute}: {saved.if_recomputed(every).bytes} bytes are saved for backward "
                "even if every block is recomputed. Allow at least as many, or keep fewer tokens."
            )
        return count


def _fitting(segments: Sequence[Segment], spare_bytes: int) -> int:
    """The number of last segments whose matrix products and attentions give less than ``spare_bytes`` in total."""
    sizes = [sum(bytes_hint(node) for node in segment.run.graph.nodes if _is_saved(node)) for segment in segments]
    return sum(total < spare_bytes for total in accumulate(reversed(sizes)))


def _is_saved(node: fx.Node) -> bool:
    return node.target in MATMULS or attention_op(node) is not None or is_selected_attention(node.target)
