"""Saved-tensor audit: partition every segment of the rewritten graph and list the tensors that it saves."""

from __future__ import annotations

from dataclasses import dataclass

from ..graph.program import Program
from ..keep.kv_modes import KEEP, KVMode
from ..lower.split import Segments
from .recompute import RecomputePlan
from .saved import saved_in


@dataclass(frozen=True)
class AuditSaved:
    """List the tensors that are saved for backward.

    Reads ``Segments`` and, if it was written, ``RecomputePlan`` (else nothing is recomputed); writes ``Audit``.
    """

    kv: KVMode = KEEP
    name: str = "saved tensors"

    def run(self, program: Program) -> Program:
        plan = program.get(RecomputePlan)
        return program.with_(saved_in(program[Segments], 0 if plan is None else plan.segments, self.kv))

    def check(self, program: Program) -> None:
        """Nothing to verify: an activation of full length is reported (``Audit.unexplained``), but not wrong."""
