"""Hook of the site's builder: links to files of the repository that are no part of the site become their text."""

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The text of a page with its links to the outside of ``docs/`` taken out, where these files exist."""
    folder = (DOCS / page.file.src_uri).parent
    return LINK.sub(lambda found: found[1] if _is_outside(folder / found[2]) else found[0], markdown)


def _is_outside(target: Path) -> bool:
    return target.exists() and not target.resolve().is_relative_to(DOCS)
