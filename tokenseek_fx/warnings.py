"""The category of this package's warnings, so that they can be filtered or turned into errors."""


class TokenSeekWarning(UserWarning):
    """A model is compiled without token selection, or something else that a user should know."""
