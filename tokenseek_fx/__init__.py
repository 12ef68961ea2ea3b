"""tokenseek-fx: fine-tune any transformer on the tokens that matter, by rewriting its graph.

Names are imported where they are first used, so that ``import tokenseek_fx`` takes little time after ``import torch``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import passes, reference, report, stats
    from .compilation import backend
    from .config import Config, ConfigError
    from .estimation import Estimate, estimate
    from .explanation import Explanation, explain
    from .given import SelectionError, selecting
    from .memory import StepMemory
    from .ops.mark import mark_tokens
    from .passes.graph.errors import GraphNotSupported, TokenSeekError
    from .passes.streams.select import ScoreInputs, needs
    from .recording import Recording, Selection, record
    from .scorers import register_scorer
    from .scoring import seek
    from .warnings import TokenSeekWarning

__all__ = [
    "Config",
    "ConfigError",
    "Estimate",
    "Explanation",
    "GraphNotSupported",
    "Recording",
    "ScoreInputs",
    "Selection",
    "SelectionError",
    "StepMemory",
    "TokenSeekError",
    "TokenSeekWarning",
    "backend",
    "estimate",
    "explain",
    "mark_tokens",
    "needs",
    "passes",
    "record",
    "reference",
    "register_scorer",
    "report",
    "seek",
    "selecting",
    "stats",
]
__version__ = "0.1.0"

_WHERE = {
    "compilation": ("backend",),
    "config": ("Config", "ConfigError"),
    "estimation": ("Estimate", "estimate"),
    "explanation": ("Explanation", "explain"),
    "given": ("SelectionError", "selecting"),
    "memory": ("StepMemory",),
    "ops.mark": ("mark_tokens",),
    "passes.graph.errors": ("GraphNotSupported", "TokenSeekError"),
    "passes.streams.select": ("ScoreInputs", "needs"),
    "recording": ("Recording", "Selection", "record"),
    "scorers": ("register_scorer",),
    "scoring": ("seek",),
    "warnings": ("TokenSeekWarning",),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f".{_MODULE_OF.get(name, name)}", __name__)
    value = getattr(module, name) if name in _MODULE_OF else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
