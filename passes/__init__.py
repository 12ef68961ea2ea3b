"""Passes: small named values that read a traced graph and write one result, usable alone or as a pipeline."""

from .activity import FindActivity
from .attend import FindAttending
from .audit import AuditSaved
from .blocks import FindBlocks
from .canonicalize import Canonicalize
from .chunks import Chunk
from .ditch import Ditch
from .pipeline import Pass, Pipeline, analysis, rewriting
from .program import Program
from .rules.axes import along, elementwise, formula
from .rules.op import axes_rule
from .rules.rows import rows_rule
from .seek import Signals
from .select import ScoreInputs, Select, needs
from .shift import UnshiftLabels
from .split import Split
from .token_axes import FindTokenAxes

__all__ = [
    "AuditSaved",
    "Canonicalize",
    "Chunk",
    "Ditch",
    "FindActivity",
    "FindAttending",
    "FindBlocks",
    "FindTokenAxes",
    "Pass",
    "Pipeline",
    "Program",
    "ScoreInputs",
    "Select",
    "Signals",
    "Split",
    "UnshiftLabels",
    "along",
    "analysis",
    "axes_rule",
    "elementwise",
    "formula",
    "needs",
    "rewriting",
    "rows_rule",
]
