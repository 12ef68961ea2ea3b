"""tokenseek-fx: fine-tune any transformer on the tokens that matter, by rewriting its graph."""

from . import passes, reference
from .backend import backend
from .config import Config, ConfigError
from .explain import Explanation, explain
from .passes.errors import GraphNotSupported, TokenSeekError
from .recording import Recording, Selection, record
from .warnings import TokenSeekWarning

__all__ = [
    "Config",
    "ConfigError",
    "Explanation",
    "GraphNotSupported",
    "Recording",
    "Selection",
    "TokenSeekError",
    "TokenSeekWarning",
    "backend",
    "explain",
    "passes",
    "record",
    "reference",
]
__version__ = "0.1.0"
