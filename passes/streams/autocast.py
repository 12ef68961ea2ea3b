"""Autocast regions of a graph, entered and exited in the stream that is being executed."""

from __future__ import annotations

from torch import fx

from ..capture.retrace import ENTER_AUTOCAST, EXIT_AUTOCAST
from ..graph.kinds import in_block


class Autocast:
    """Runs the autocast switches of a graph.

    Args:
        interpreter: executes the switches, and knows the open ones.
    """

    def __init__(self, interpreter: fx.Interpreter) -> None:
        self._interpreter, self._known = interpreter, interpreter.env

    def run(self, switch: fx.Node) -> None:
        """Enter or exit a region."""
        args, kwargs = self._interpreter.fetch_args_kwargs_from_env(switch)
        self._known[switch] = self._interpreter.call_function(switch.target, args, kwargs)  # type: ignore[arg-type]

    def reenter(self, block: int) -> None:
        """Exit open regions at the end of a block and enter them again in the next one."""
        switch, known = self._interpreter.call_function, self._known
        entered = [
            node for node in known if node.target is ENTER_AUTOCAST and not any(map(known.__contains__, node.users))
        ]
        with in_block(block):
            for node in reversed(entered):
                switch(EXIT_AUTOCAST, (known[node],), {})
        with in_block(block + 1):
            known.update({node: switch(ENTER_AUTOCAST, node.args, {}) for node in entered})
