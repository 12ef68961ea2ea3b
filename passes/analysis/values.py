"""Values: the kind of a value, for reports and for the streams."""

from __future__ import annotations

from torch import fx

from ..graph.kinds import Kind
from ..graph.nodes import is_tensor
from ..graph.op_sets import LAYOUT
from ..graph.program import Program
from ..rules.attention import read_across
from .token_axes import TokenAxes


def kind_of_value(program: Program, node: fx.Node, classes: set[int]) -> Kind:
    """The kind of a value: logits, scores, keys/values or activations.

    Logits have one of the ``classes`` factors, scores have two token axes.
    """
    if not is_tensor(node):
        return Kind.ACTIVATIONS
    if classes & set(sum(program[TokenAxes].of(node), ())):
        return Kind.LOGITS
    if len(program[TokenAxes].token_dims(node)) > 1:
        return Kind.SCORES
    return Kind.KEYS_VALUES if feeds_attention(node) else Kind.ACTIVATIONS


def feeds_attention(node: fx.Node) -> bool:
    """True if attention reads the value at all positions: keys, values, or the right operand of a product."""
    return any(node in read_across(user) or (user.target in LAYOUT and feeds_attention(user)) for user in node.users)
