"""Every architecture of the zoo: exact against the reference, or refused with a reason. ``docs/support.md`` says which.

They are slow tests: ``make test ALL=1`` and continuous integration run them. ``EXPECTTEST_ACCEPT=1`` regenerates their
rows. The page is that of PyTorch 2.13: with another version the partitioner saves other values and transformers makes
other masks, so only the verdict is compared.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from architectures import ARCHITECTURES, Built, build, forms
from captured import captured
from compare import TOPK, Run, by_reference, compiled, error, executed, grads_of, traced
from marks import PYTORCH
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

import tokenseek_fx
from tokenseek_fx import GraphNotSupported
from tokenseek_fx.passes.streams.trace import Rewrite

PAGE = Path(__file__).parents[1] / "docs" / "support.md"
SHORT, LONG, KEEP = 13, 256, 0.1
CASES = [(name, attn) for name in ARCHITECTURES for attn in forms(name)]
#: Grouped matrix products have no float64 on CPUs.
SINGLE = {"gpt_oss", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"}
#: A scan in chunks has barriers by its length.
OF_LENGTH = {"bamba"}
#: Architectures whose saved bytes and cost are measured: each has a part, or a form of attention, of its own.
MEASURED = OF_LENGTH | {
    "llama", "gemma2", "gpt2", "bloom", "mpt", "deepseek_v3", "qwen3_moe", "gpt_oss", "mamba", "jamba",
    "deberta_v2 mlm", "modernbert mlm", "t5", "vit", "segformer", "clip",
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attn"), CASES)
def test_what_the_page_says_of_an_architecture(name, attn):
    """Also keys and values of all tokens are live as defined (``kv_grad="all"``), in the same graph.

    Saved bytes and the cost are measured for the first form of attention of ``MEASURED``, and where rows are
    regenerated. Otherwise those of the page are taken: the other architectures are made of the same parts, and eager
    attention by position saves and costs the same (``test_size`` and ``test_saving`` compare the forms). Barriers are
    counted for every form.

    In DPT the input of a layer is not the residual stream alone: the neck reads the layers before it too.
    """
    if name == "jamba" and PYTORCH == (2, 11):
        pytest.skip(
            "Dynamo of PyTorch 2.11 behaves as in an export: the scan is a loop, "
            "and the reference can't say whose rows its states are"
        )
    case = build(name, attn, SHORT, torch.float32 if name in SINGLE else torch.float64)
    accept = PYTORCH == (2, 13) and bool(os.environ.get("EXPECTTEST_ACCEPT"))
    measures = accept or name in OF_LENGTH or (name in MEASURED and attn == forms(name)[0])
    row = f"| {' | '.join((name, attn, *result(name, attn, case, measures)))} |"
    if accept:
        write(name, attn, row)
    same = (lambda line: line) if PYTORCH == (2, 13) else verdict
    assert same(row) == same(row_of(name, attn))
    refused = name == "dpt" or verdict(row) == "refused"
    with pytest.raises(GraphNotSupported) if refused else contextlib.nullcontext():
        check_exact(*case, executed, kv_grad="all")


class Half(nn.Module):
    """The attention of a layer of SegFormer: its MLP mixes tokens as well."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.norm, self.attention = layer.layernorm_before, layer.attention

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return x + self.attention(self.norm(x), height, width)[0]


def halved(layer: Any) -> Half:
    """The first half of a layer; the layer then calls it."""
    half = Half(layer)

    def run(x: Tensor, height: int, width: int, **asked: Any) -> Tensor:
        x = half(x, height, width)
        return x + layer.mlp(layer.layernorm_after(x), height, width)

    layer.forward = run
    return half


def attending(model: nn.Module) -> list[nn.Module]:
    """The innermost entries of a model's lists of layers that have an attention."""
    layers = [layer for each in model.modules() if isinstance(each, nn.ModuleList) for layer in each]
    kinds = ("attention", "handwritten")
    found = [x for x in layers if any(kind in type(part).__name__.lower() for part in x.modules() for kind in kinds)]
    inner = [x for x in found if not any(other is not x and other in {*x.modules()} for other in found)]
    return [
        halved(x) if isinstance(x, transformers.models.segformer.modeling_segformer.SegformerLayer) else x
        for x in inner
    ]


class Recurrence(nn.Module):
    """Attention, then a state passed from token to token in a loop. ``only``: applied to values with a token axis."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.steps, self.head = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(8, 1)
        self.only = lambda x: x
        self.double()

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        q, k, v = map(self.only, self.qkv(x).chunk(3, -1))
        x = self.only(x + F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0])
        decay, added, read = map(self.only, self.steps(x).sigmoid().chunk(3, -1))
        state, outputs = torch.zeros_like(x[:, 0]), []
        for i in range(SHORT):
            state = decay[:, i] * state + added[:, i]
            outputs.append(state * read[:, i])
        y = self.head(self.only(x + torch.stack(outputs, 1))).squeeze(-1)
        return y if target is None else F.mse_loss(y, target)


def test_a_recurrence_in_a_loop_is_exact():
    """A state has no token axis: gradient passes through it to the kept rows before.

    The same holds for Jamba's scan with PyTorch 2.11, which the reference can't check.
    """
    model, batch = Recurrence(), {"x": torch.randn(3, SHORT, 8).double(), "target": torch.randn(3, SHORT).double()}
    run, by_hand = compiled(model, batch, report_loss="kept", inner="eager"), copy.deepcopy(model)
    kept = torch.zeros(3, SHORT, dtype=torch.bool).scatter(1, run.indices, True)
    by_hand.only = lambda x: torch.where(kept[..., None], x, x.detach())
    loss = F.mse_loss(by_hand(batch["x"])[kept], batch["target"][kept])
    loss.backward()
    torch.testing.assert_close(run.loss, loss)
    assert error(run.grads, grads_of(by_hand)) < 1e-9


@pytest.mark.slow
def test_inductor_reads_the_sum_of_experts_after_it_is_complete():
    """PyTorch alone is wrong if the sum is fused with its reader (``compat``)."""
    model, batch = build("deepseek_v3", "sdpa", SHORT, torch.float32)
    del model.model.layers[0]  # which has no experts
    with fresh_cache():  # a cached kernel would hide an error in compiling it now
        check_exact(model, batch, compiled, inner="inductor")


def test_the_page_has_every_architecture():
    rows = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in PAGE.read_text().splitlines()]
    assert [row for row in rows if row in CASES] == CASES


def row_of(name: str, attn: str) -> str:
    """The row of the page."""
    (row,) = (line for line in PAGE.read_text().splitlines() if line.startswith(f"| {name} | {attn} |"))
    return row


def verdict(row: str) -> str:
    """Exact or refused."""
    return row.split(" | ")[2].split(":")[0]


def result(name: str, attn: str, case: Built, measures: bool) -> tuple[str, ...]:
    """The cells of a row: exact or the reason why not, saved bytes, barriers, cost.

    Unless ``measures``, bytes and cost are those of the page.
    """
    try:
        check_exact(*case, traced)
    except GraphNotSupported as refusal:
        return (f"refused: {refusal.args[0].split('. ')[0].rstrip('.')}", "", "", "", "")
    if measures:
        return ("exact", *sizes(name, attn))
    saved, ratio, _, cost = row_of(name, attn).removesuffix(" |").split(" | ")[3:]
    (program,) = captured(*case).traced
    return ("exact", saved, ratio, str(len(program[Rewrite].barriers)), cost)


def check_exact(model: nn.Module, batch: dict[str, Any], train: Callable[..., Run], **options: Any) -> None:
    """Loss and every gradient equal the reference for the kept rows of every token axis."""
    run = graph_refusal(lambda: train(model, batch, report_loss="kept", **options))
    chosen = run.selection
    blocks = attending if options.get("kv_grad") == "all" else None
    expected = by_reference(model, batch, run.indices, chosen.scores.shape[1], None, blocks, chosen.others)
    single = next(model.parameters()).dtype == torch.float32
    tolerance = 1e-5 if single else 1e-6  # transformers computes losses and norms in float32
    torch.testing.assert_close(run.loss.detach(), expected.loss.detach(), rtol=tolerance, atol=1e-9)
    assert error(run.grads, expected.grads) <= tolerance


def graph_refusal(run):
    """What ``run`` returns; a refusal is raised without Dynamo's wrapping error."""
    try:
        return run()
    except torch._dynamo.exc.BackendCompilerFailed as failed:
        raise failed.inner_exception from None


def sizes(name: str, attn: str) -> tuple[str, ...]:
    """Bytes saved for backward, plain and rewritten, barriers, and cost in forwards a step."""
    torch._dynamo.reset()
    model, batch = build(name, attn, LONG, torch.float32)
    with contextlib.redirect_stdout(io.StringIO()):
        options = {"keep_ratio": KEEP, "logits": "drop", **TOPK}
        report = tokenseek_fx.explain(model, **batch, options=options)
    assert report.refusal is None
    plain, rewritten = report.plain.bytes, report.rewritten.bytes
    saved = f"{plain / 1024:.0f} -> {rewritten / 1024:.0f}"
    return saved, f"{rewritten / plain:.2f}", str(len(report.barriers)), f"{report.forwards:.2f}"


def write(name: str, attn: str, row: str) -> None:
    """Put a row in its place in the table of the page."""
    head, table, tail = PAGE.read_text().partition("| --- | --- | --- | ---: | ---: | ---: | ---: |\n")
    rows, rest = tail.split("\n\n", 1)
    known = {tuple(cell.strip() for cell in line.split("|")[1:3]): line for line in rows.splitlines()}
    known[name, attn] = row
    ordered = [known[case] for case in CASES if case in known]
    PAGE.write_text("".join((head, table, "\n".join(ordered), "\n\n", rest)))
