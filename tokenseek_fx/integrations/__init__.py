"""Callbacks for training libraries. A callback imports its library, which this package doesn't install."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .trainer import TokenSeekCallback

__all__ = ["TokenSeekCallback"]


def __getattr__(name: str) -> Any:
    if name != "TokenSeekCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .trainer import TokenSeekCallback
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "transformers":
            raise
        raise ImportError(
            "TokenSeekCallback needs transformers, which is not installed: pip install 'tokenseek-fx[hf]'"
        ) from error
    return TokenSeekCallback
