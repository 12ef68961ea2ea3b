"""``python -m tokenseek_fx.cli`` runs ``tokenseek``."""

from . import main

main()
