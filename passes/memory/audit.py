"""Saved-tensor audit: partition every segment of the rewritten graph and list the tensors that it saves."""

from __future__ import annotations

from dataclasses import dataclass

from ..graph.program import Program
from ..keep.kv_modes import KEEP, KVMode
from ..lower.split import Segments
from .recompute import RecomputePlan
from .saved import SavedTensors


@dataclass(frozen=True)
class AuditSaved:
    """List the tensors that are saved for backward.

    Reads ``Segments`` and, if they were written, ``RecomputePlan`` and ``SavedTensors`` (else nothing is recomputed);
    writes ``Audit``.
    """

    kv: KVMode = KEEP
    name: str = "saved tensors"

    def run(self, program: Program) -> Program:
        plan = program.get(RecomputePlan)
        saved = program.get(SavedTensors) or SavedTensors(program[Segments], self.kv)
        return program.with_(saved.if_recomputed(0 if plan is None else plan.segments))

    def check(self, program: Program) -> None:
        """Nothing to verify: an activation of full length is reported (``Audit.unexplained``), but not wrong."""
