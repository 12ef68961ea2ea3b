"""The command line, ``tokenseek``. Needs the extra ``cli``; no other module of the package imports it."""

from __future__ import annotations

import sys


def main() -> None:
    """Run ``tokenseek``. Without typer or rich, exit with the pip command that installs them."""
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"tokenseek: the command line needs {error.name}: pip install 'tokenseek-fx[cli]'")
    app()
