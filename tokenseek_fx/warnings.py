"""The category of this package's warnings, for filters."""


class TokenSeekWarning(UserWarning):
    """A model is compiled without token selection, or an option has no effect."""
