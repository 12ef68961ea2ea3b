"""Row rules by family: operations re-executed on the kept rows. Importing the package registers them."""

from __future__ import annotations

from torch import fx

from ..rules.attention import attention_op
from . import attention, custom, losses
from .rules import ROWS_RULES, RowsRule

__all__ = ["attention", "custom", "losses", "row_rule_for"]


def row_rule_for(node: fx.Node) -> RowsRule | None:
    """The row rule of a node's operation; all attention operations have the same."""
    return ROWS_RULES.get(node.target) or (attention.attention if attention_op(node) is not None else None)
