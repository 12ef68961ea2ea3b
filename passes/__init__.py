"""Passes: small frozen objects that read a traced graph and write one result, alone or in a pipeline."""

from .analysis.activity import FindActivity
from .analysis.blocks import FindBlocks
from .analysis.routing import FindRoutes
from .analysis.token_axes import FindTokenAxes
from .attention.positional import FindPositionalAttention
from .capture.canonicalize import Canonicalize
from .capture.unshift_labels import UnshiftLabels
from .graph.program import Program
from .keep.frozen_rows import FindFrozenRows
from .keep.kv_modes import KVMode, register_kv_mode
from .keep.recompute_kv import PlanKV
from .lower.chunks import Chunk
from .lower.split import CopyKV, Split
from .lower.unalias import UnaliasOutputs
from .memory.audit import AuditSaved
from .memory.recompute import PlanRecompute
from .pipeline import Pass, Pipeline, training
from .plan import Plan
from .rows.rules import rows_rule
from .rules.attention import AttentionOp, attention_rule
from .rules.axes import along, elementwise, formula
from .rules.op import axes_rule
from .show import show
from .streams.select import ScoreInputs, Select, needs
from .streams.selection_plan import PlanSelection
from .streams.signals import Prefill, Signals, signal
from .streams.trace import TraceStreams
from .streams.two_streams import BuildStreams, PlanScoring

__all__ = [
    "AttentionOp",
    "AuditSaved",
    "BuildStreams",
    "Canonicalize",
    "Chunk",
    "CopyKV",
    "FindActivity",
    "FindBlocks",
    "FindFrozenRows",
    "FindPositionalAttention",
    "FindRoutes",
    "FindTokenAxes",
    "KVMode",
    "Pass",
    "Pipeline",
    "Plan",
    "PlanKV",
    "PlanRecompute",
    "PlanScoring",
    "PlanSelection",
    "Prefill",
    "Program",
    "ScoreInputs",
    "Select",
    "Signals",
    "Split",
    "TraceStreams",
    "UnaliasOutputs",
    "UnshiftLabels",
    "along",
    "attention_rule",
    "axes_rule",
    "elementwise",
    "formula",
    "needs",
    "register_kv_mode",
    "rows_rule",
    "show",
    "signal",
    "training",
]
