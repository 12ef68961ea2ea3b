"""HTML for notebooks: small tables and bars in the notebook's colours. All text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from .. import stats

if TYPE_CHECKING:
    from ..explanation import Explanation
    from ..recording import Selection

_MIB = 2**20


def recording_html(recording: Sequence[Selection]) -> str:
    """The figures of ``stats.summary`` and a histogram of the positions of kept tokens, as HTML."""
    if not any(step.indices.numel() for step in recording):
        return _table("Recording", [("steps", str(len(recording)))])
    found = stats.summary(recording, bins=20)
    shares = {
        "of all tokens": found.kept / found.tokens,
        "of labelled tokens": found.labelled_kept,
        "of the gradient": found.gradient_kept,
        "of the loss": found.loss_kept,
        "overlap of visits": found.visit_overlap,
    }
    rows = [("steps", str(found.steps)), ("sequences", str(found.sequences))]
    rows += [(name, f"{share:.1%}") for name, share in shares.items() if share is not None]
    return _table(f"Recording: kept {found.kept} of {found.tokens} tokens", rows) + _bars(found.positions)


def explanation_html(explanation: Explanation) -> str:
    """The report of ``explain`` as HTML tables, and the rewritten graph in collapsed blocks."""
    if explanation.refusal:
        return f"<p><b>tokenseek: compiled without token selection.</b> {escape(explanation.refusal)}</p>"
    title = f"Keeps {explanation.kept} of {explanation.tokens} tokens in each of {explanation.batch} sequences"
    rows = [
        *((f"kept of {tokens} on a further token axis", str(kept)) for tokens, kept in explanation.others),
        ("attentions", str(len(explanation.attentions))),
        ("loss", ", ".join(explanation.losses) or "outside the graph"),
        ("operations on the kept rows only", f"{explanation.ditched} of {explanation.live}"),
        ("cost of a step in forwards (all tokens: 3)", f"{explanation.forwards:.2f}"),
        ("barriers", "none" if not explanation.barriers else str(len(explanation.barriers))),
        *(("", str(barrier)) for barrier in explanation.barriers),
    ]
    return "".join([_table(title, rows), _saved(explanation), *map(_opened, explanation.graphs)])


def _saved(explanation: Explanation) -> str:
    plain, rewritten = explanation.plain.by_kind(), explanation.rewritten.by_kind()
    rows = [(kind, plain.get(kind, 0), rewritten.get(kind, 0)) for kind in sorted({*plain, *rewritten})]
    rows.append(("total", explanation.plain.bytes, explanation.rewritten.bytes))
    cells = [(name, f"{a / _MIB:.2f}", f"{b / _MIB:.2f}") for name, a, b in rows]
    return _table("Saved for backward (MiB)", [("", "all tokens", "tokenseek"), *cells])


def _opened(text: str) -> str:
    title, _, lines = text.partition("\n")
    style = "max-height:30em;overflow:auto;font-size:smaller"
    return f'<details><summary>{escape(title)}</summary><pre style="{style}">{escape(lines)}</pre></details>'


def _table(title: str, rows: Iterable[Sequence[Any]]) -> str:
    style = 'style="text-align:left"'
    cells = ("".join(f"<td {style}>{escape(str(cell))}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f"<table><caption {style}><b>{escape(title)}</b></caption><tbody>{body}</tbody></table>"


def _bars(shares: Sequence[float]) -> str:
    """A histogram in the colour of the text, as SVG."""
    heights = [40 * share / max(shares) for share in shares]
    bars = (
        f'<rect x="{12 * i}" y="{40 - height:.1f}" width="10" height="{height:.1f}"/>'
        for i, height in enumerate(heights)
    )
    size = f'width="{12 * len(shares)}" height="40" role="img" aria-label="kept tokens by position in the sequence"'
    caption = "<small>kept tokens, start to end of the sequence</small>"
    return f'<svg {size} fill="currentColor">{"".join(bars)}</svg><br>{caption}'
