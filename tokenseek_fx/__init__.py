"""tokenseek-fx: fine-tune any transformer on the tokens that matter, by rewriting its graph."""

from . import passes, reference, report, stats
from .backend import backend
from .config import Config, ConfigError
from .estimate import Estimate, estimate
from .explain import Explanation, explain
from .given import SelectionError, selecting
from .memory import StepMemory
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
