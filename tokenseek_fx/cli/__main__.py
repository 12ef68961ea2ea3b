"""``python -m tokenseek_fx.cli``: the same as ``tokenseek``."""

from . import main

main()
