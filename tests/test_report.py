"""Reports: what a run holds, how recordings become runs, and that no text can break out of the page."""

from __future__ import annotations

import doctest
import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from golden_model import BATCH, TOKENS, VOCAB, Model

import tokenseek_fx
from tokenseek_fx import Explanation, Recording, Selection
from tokenseek_fx.report import Example, Run, Step, example_of, memory_of, run_of, write_report
from tokenseek_fx.report import recorded as recorded_module
from tokenseek_fx.report import run as run_module

HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<!--<script>",
    "]]>",
    "\"'><img src=x onerror=hacked=1>",
    "\u2028\u2029",
    "\u202eevil\u202c",
    "&lt;b&gt;",
    "\ud800",
    "\x00\x1b",
    "${hacked}",
    "<!--PROGRAM-->",
]
SCRIPTS = ("application/json", None)


def hostile_run() -> Run:
    """Every text of a run is an attack."""
    bad = HOSTILE[0]
    example = Example(1, bad, HOSTILE, [0, 2], scores=[float(i) for i in range(len(HOSTILE))])
    memory = {bad: {bad: 5}, HOSTILE[3]: {bad: 3}}
    steps = [Step(1, 2.0, kept=0.5), Step(2, 1.0, kept=0.5)]
    return Run(bad, {HOSTILE[3]: bad}, steps, examples=[example], memory=memory, graphs=["\n".join(HOSTILE)])


class Page(HTMLParser):
    """What an HTML parser finds: attributes of every element, and the text of the scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.found and self.found[-1][0] == "script":
            self.scripts[-1] += data if not self.scripts[-1] else ""


def recording() -> Recording:
    """Two visits of two sequences of 4 tokens."""
    labelled = torch.tensor([[False, True, True, True], [False, False, False, True]])
    known = {"labelled": labelled, "instances": torch.tensor([7, 8])}
    scores = torch.tensor([[1.0, 2.0, 3.0, -torch.inf], [0.0, 1.0, 2.0, 3.0]])
    return Recording([Selection(torch.tensor(rows), scores, **known) for rows in ([[0, 1], [2, 3]], [[0, 1], [1, 3]])])


def test_a_run_is_read_as_it_was_written(tmp_path):
    run = hostile_run()
    run.save(tmp_path / "new")
    assert Run.load(tmp_path / "new") == run
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run.json"]


def test_numbers_that_are_not_finite_are_written_as_unknown(tmp_path):
    scores = [1.0, float("-inf"), float("nan")]
    Run("r", steps=[Step(1, loss=float("inf"))], examples=[Example(1, "e", list("abc"), [0], scores)]).save(tmp_path)
    run = Run.load(tmp_path)
    assert run.steps == [Step(1)] and run.examples[0].scores == [1.0, None, None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a run of format version 1"),
        ('{"title": "r"}', "is not a run of format version 1"),
        ('{"version": 1}', "expected a Run with fields from title, .*; got steps, plain, examples"),
        (
            '{"version": 1, "title": "r", "steps": [{"step": 1, "lost": 2}]}',
            "expected a Step with fields from step, .*; got step, lost",
        ),
    ],
)
def test_a_file_that_is_not_a_run_is_refused(tmp_path, text, message):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Run.load(tmp_path)


def test_an_example_has_one_value_for_every_token():
    with pytest.raises(ValueError, match="expected 2 values in `gradient`, one for each token; got 1"):
        Example(1, "e", ["a", "b"], [0], gradient=[1.0])
    with pytest.raises(ValueError, match="keeps position 2, but has 2 tokens"):
        Example(1, "e", ["a", "b"], [2])


def test_no_text_breaks_out_of_the_page(tmp_path):
    run = hostile_run()
    page = Page(write_report(run, tmp_path / "new" / "report.html").read_text(encoding="utf-8"))
    scripts = [attributes.get("type") for tag, attributes in page.found if tag == "script"]
    assert tuple(scripts) == SCRIPTS and not any(tag == "img" for tag, _ in page.found)
    assert json.loads(page.scripts[0]) == run.plain_data()
    assert page.scripts[0].isascii() and not set("<>&") & set(page.scripts[0])


def test_the_page_needs_no_other_file(tmp_path):
    page = Page(write_report(Run("r"), tmp_path / "report.html").read_text(encoding="utf-8"))
    links = [attributes[name] for _, attributes in page.found for name in ("src", "href") if name in attributes]
    assert links and all(link.startswith("#") for link in links)
    (policy,) = (attributes["content"] for _, attributes in page.found if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy


def test_a_recording_becomes_a_run():
    steps = [Step(10, loss=2.0, seconds=0.5), Step(20, loss=1.0)]
    ids = torch.arange(8).view(2, 4)
    run = run_of(recording(), steps, plain=[Step(10, 3.0)], batches=[ids, ids], decode=lambda ids: f"<{ids[0]}>")
    assert run.steps == [Step(10, 2.0, 0.5, 0.5, 2 / 4), Step(20, 1.0, None, 0.5, 2 / 4, None, (1 + 1 / 3) / 2)]
    assert [(e.step, e.name, e.kept) for e in run.examples] == [(s, "sequence 1 of 2", [0, 1]) for s in (10, 20)]
    assert run.examples[0].tokens == ["<0>", "<1>", "<2>", "<3>"]
    assert run.examples[0].scores == [1.0, 2.0, 3.0, None] and run.examples[0].labelled == [False, True, True, True]
    assert run.plain == [Step(10, 3.0)] and sum(run.positions) == pytest.approx(1)


def test_examples_are_spread_over_the_run():
    rec = recording() * 10
    ids = torch.zeros(2, 4, dtype=torch.long)
    run = run_of(rec, batches=[ids] * 20, decode=str, examples=3)
    assert [example.step for example in run.examples] == [1, 11, 20]
    assert not run_of(rec).examples


def test_a_run_of_other_steps_or_other_ids_is_refused():
    with pytest.raises(ValueError, match="`steps`: expected 2, one for each recorded step, or none; got 1"):
        run_of(recording(), [Step(1)])
    with pytest.raises(ValueError, match=r"shape \[1, 4\], but the recorded scores \[2, 4\]"):
        example_of(recording()[0], torch.zeros(1, 4), str, step=1)


@pytest.fixture(scope="module")
def explanation() -> Explanation:
    ids = torch.arange(BATCH * TOKENS).view(BATCH, TOKENS) % VOCAB
    torch._dynamo.reset()
    return tokenseek_fx.explain(Model(), ids, ids, options={"keep_tokens": 3})


def test_the_graph_comes_block_by_block(explanation):
    everything, *blocks = explanation.graphs
    assert everything.startswith("all tokens, and the choice (operations: ")
    assert [block.split(" (")[0] for block in blocks] == ["kept rows, block 1", "kept rows, block 2"]
    lines = [line for block in blocks for line in block.split("\n")[1:]]
    assert lines and all(line.endswith("# rows") for line in lines)
    assert not any(line.endswith("# rows") and "linear" in line for line in everything.split("\n"))


class Mixing(Model):
    """Sorts along the tokens, which no rule restricts to rows."""

    def forward(self, ids, labels):
        loss, logits = super().forward(ids, labels)
        return loss + self.embed(ids).cumsum(1).mean(), logits


def test_barriers_are_marked_in_the_graph():
    ids = torch.arange(BATCH * TOKENS).view(BATCH, TOKENS) % VOCAB
    torch._dynamo.reset()
    explained = tokenseek_fx.explain(Mixing(), ids, ids, options={"keep_tokens": 3})
    marked = [line for block in explained.graphs for line in block.split("\n") if "# barrier, runs over" in line]
    assert {barrier.node.target._schema.name.split("::")[1] for barrier in explained.barriers} == {
        line.split(" = ")[1].split("(")[0] for line in marked
    }


def test_the_split_of_memory_counts_every_byte(explanation):
    model = Model().requires_grad_(False)
    model.head.requires_grad_(True)
    optimizer = torch.optim.SGD(model.head.parameters(), lr=1.0, momentum=0.9)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    optimizer.step()
    memory = memory_of(explanation, model, optimizer)
    head = model.head.weight.numel() * 4
    for way, audit in {"tokenseek": explanation.rewritten, "all tokens": explanation.plain}.items():
        parts = memory[way]
        assert parts["parameters"] == sum(4 * p.numel() for p in model.parameters())
        assert parts["gradients"] == parts["optimizer"] == head
        assert parts["activations"] + parts["logits"] + parts["keys/values"] == audit.bytes
        assert parts["keys/values"] == audit.by_kind()["keys/values"]


def test_a_notebook_shows_recordings_and_explanations(explanation):
    shown = recording()._repr_html_()
    assert "kept 8 of 16 tokens" in shown and "<td" in shown and shown.count("<rect") == 20
    assert "of the gradient" not in shown, "it was not recorded"
    assert "steps" in Recording()._repr_html_()
    text = explanation._repr_html_()
    assert "Keeps 3 of 5 tokens" in text and text.count("<details>") == len(explanation.graphs)


def test_a_notebook_escapes_every_text():
    bad = HOSTILE[0]
    refused = Explanation(refusal=bad)._repr_html_()
    shown = Explanation(tokens=2, kept=1, losses=(bad,), graphs=(f"{bad}\n{bad}",))._repr_html_()
    assert not any(tag == "script" for html in (refused, shown) for tag, _ in Page(html).found)
    assert "&lt;script&gt;" in refused and shown.count("&lt;script&gt;") == 3


def test_the_examples_of_the_docstrings_are_true():
    for module in (run_module, recorded_module, sys.modules[write_report.__module__]):
        assert doctest.testmod(module).failed == 0


def test_the_page_is_in_the_package():
    folder = Path(run_module.__file__).parent
    declared = (folder.parents[1] / "pyproject.toml").read_text()
    assert all(f'"{path.name}"' in declared for path in folder.glob("report.*"))
