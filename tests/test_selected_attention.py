"""Selected attention: what it computes, its gradient, and that compilers can trace it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from largest import Largest
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tokenseek_fx.ops import attention_blocks as blocks
from tokenseek_fx.ops.attention import definition, selected_attention
from tokenseek_fx.ops.visibility import Visibility

GRADS = ("query", "row_key", "row_value", "sinks")
OP = torch.ops.tokenseek_fx.selected_attention


VISIBILITY = {field.name for field in fields(Visibility)}


def visibility_of(given: dict) -> Visibility:
    return Visibility(**{name: x for name, x in given.items() if name in VISIBILITY})


def call(function, given: dict) -> Tensor:
    """``function`` with the fields of a visibility among its operands."""
    rest = {name: x for name, x in given.items() if name not in VISIBILITY}
    return function(**rest, visibility=visibility_of(given))


def attend(**given) -> Tensor:
    return call(selected_attention, given)


def define(**given) -> Tensor:
    return call(definition, given)


def rows_of(batch: int, rows: int, tokens: int) -> Tensor:
    return torch.stack([torch.randperm(tokens)[:rows].sort().values for _ in range(batch)])


def operands(batch=2, heads=4, key_heads=2, rows=5, tokens=13, width=8, value_width=8, dtype=torch.float64, **options):
    """Operands as a model has them: features after heads, the rows' keys and values those of all tokens."""
    torch.manual_seed(0)
    options = {name: given for name, given in options.items() if given is not None}
    key, value = (torch.randn(batch, tokens, key_heads, n, dtype=dtype).transpose(1, 2) for n in (width, value_width))
    positions = rows_of(batch, rows, tokens)
    at = options.get("columns", positions)[:, None, :, None].expand(-1, key_heads, -1, -1)
    made = {
        "query": torch.randn(batch, rows, heads, width, dtype=dtype).transpose(1, 2),
        "row_key": key.gather(2, at.expand(-1, -1, -1, width)),
        "row_value": value.gather(2, at.expand(-1, -1, -1, value_width)),
        "key": key,
        "value": value,
        "positions": positions,
    }
    return made | options


def grads(function, given: dict, direction: Tensor) -> dict[str, Tensor]:
    """The value, and the gradients of operands that may have one."""
    live = {name: given[name].detach().requires_grad_() for name in GRADS if given.get(name) is not None}
    out = function(**(given | live))
    found = torch.autograd.grad(out, list(live.values()), direction)
    return {"out": out.detach()} | dict(zip(live, found, strict=True))


def assert_same(given: dict, function=attend, tolerance: float = 1e-12) -> None:
    """Value and gradients of ``function`` are those of the definition, in float64."""
    exact = {name: t.double() if torch.is_tensor(t) and t.is_floating_point() else t for name, t in given.items()}
    shape = (*given["query"].shape[:3], given["value"].shape[-1])
    direction = torch.randn(shape, dtype=given["query"].dtype)
    want = grads(define, exact, direction.double())
    got = grads(function, given, direction)
    for name, expected in want.items():
        assert not got[name].isnan().any(), name
        assert (got[name].double() - expected).abs().max() <= tolerance * max(1, expected.abs().max()), name


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("window", [0, 1, 4])
@pytest.mark.parametrize(
    "segments", [None, torch.tensor([[0] * 6 + [1] * 7, [2] * 3 + [0] * 10])], ids=["", "segments"]
)
def test_definition_is_scaled_dot_product_attention_over_scattered_keys(causal, additive, window, segments):
    given = operands(causal=causal, window=window, segments=segments)
    at = given["positions"][:, None, :, None]
    live = {name: given[name].requires_grad_() for name in GRADS[:3]}
    key, value = (
        given[n].scatter(2, at.expand(live[r].shape), live[r])
        for n, r in zip(("key", "value"), GRADS[1:3], strict=True)
    )
    hidden = (torch.rand(2, 1, 5, 13) < 0.2) & (torch.arange(13) != at)  # a row sees itself
    added = torch.randn(2, 4, 5, 13, dtype=torch.float64) if additive else torch.zeros(())
    mask = added.masked_fill(hidden, -torch.inf) if additive else ~hidden
    seen = (torch.arange(13) <= at) | (not causal)
    if window:
        seen = seen & ((torch.arange(13) - at).abs() < window)
    if segments is not None:
        seen = seen & (segments.gather(1, at[:, 0, :, 0])[:, None, :, None] == segments[:, None, None])
    whole = added.masked_fill(hidden | ~seen, -torch.inf).double()
    want = F.scaled_dot_product_attention(given["query"], key, value, whole, enable_gqa=True)
    got = define(**given, mask=mask)
    direction = torch.randn_like(want)
    assert (want - got).abs().max() < 1e-12
    for a, b in zip(*(torch.autograd.grad(out, list(live.values()), direction) for out in (want, got)), strict=True):
        assert (a - b).abs().max() < 1e-12


@st.composite
def cases(draw, dtypes=(torch.float64,), most=3):
    batch, key_heads, groups = draw(st.integers(1, most)), draw(st.integers(1, most)), draw(st.integers(1, 3))
    tokens = draw(st.integers(1, 40))
    rows, heads = draw(st.integers(1, tokens)), key_heads * groups
    width = draw(st.sampled_from([1, 4, 7, 16]))
    made = operands(
        batch, heads, key_heads, rows, tokens, width, draw(st.sampled_from([width, 5])), draw(st.sampled_from(dtypes)),
        causal=draw(st.booleans()), window=draw(st.sampled_from([0, 1, 3, 100])),
        scale=draw(st.sampled_from([None, 0.3])), softcap=draw(st.sampled_from([0.0, 2.0])),
    )  # fmt: skip
    made["columns"] = draw(st.sampled_from([None, rows_of(batch, draw(st.integers(1, tokens)), tokens)]))
    if made["columns"] is not None:
        at = made["columns"][:, None, :, None].expand(-1, key_heads, -1, -1)
        for name in ("key", "value"):
            made[f"row_{name}"] = made[name].gather(2, at.expand(-1, -1, -1, made[name].shape[-1]))
    made["sinks"] = draw(st.sampled_from([None, torch.randn(heads, dtype=made["query"].dtype)]))
    segments = torch.randint(3, (draw(st.sampled_from([1, batch])), tokens)).sort().values
    made["segments"] = draw(st.sampled_from([None, segments]))
    sizes = [draw(st.sampled_from([1, n])) for n in (batch, heads, rows, tokens)]
    kind = draw(st.sampled_from(["none", "bool", "added", "hiding"]))
    if kind != "none":
        seen, added = torch.rand(sizes) < 0.7, torch.randn(sizes, dtype=made["query"].dtype)
        made["mask"] = {"bool": seen, "added": added, "hiding": added.masked_fill(~seen, -torch.inf)}[kind]
    return made


@settings(max_examples=150, deadline=None)
@given(cases())
def test_equals_the_definition(given):
    assert_same(given)


def test_equals_the_definition_over_many_blocks():
    given = operands(2, 6, 2, 300, 700, 4, causal=True, window=150)
    assert_same(given)
    assert_same(given | {"softcap": 1.5, "sinks": torch.randn(6, dtype=torch.float64)})
    assert_same(given | {"causal": False})


def test_equals_the_definition_where_the_rows_are_all_tokens():
    given = operands(2, 4, 2, 90, 90, 8, causal=True)
    assert_same(given)
    assert_same(given | {"row_key": None, "row_value": None})
    assert_same(given | {"mask": torch.rand(2, 1, 1, 90) < 0.8})
    assert_same(given | {"segments": torch.randint(3, (2, 90)).sort().values})
    assert_same(given | {"window": 7})


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 30), st.integers(1, 20), st.integers(0, 12), st.sampled_from([torch.float64, torch.bfloat16]))
def test_equals_the_definition_where_the_rows_are_consecutive(start, rows, later, dtype):
    given = operands(2, 4, 2, rows, start + rows + later, 8, causal=True, dtype=dtype)
    positions = torch.arange(start, start + rows).expand(2, -1)
    given = given | {"positions": positions, "row_key": None, "row_value": None}
    spec = blocks.ScoreSpec.of(given["query"], given["key"], positions, Visibility(causal=True), None, 0.0)
    assert spec.start == start
    assert_same(given, tolerance=1e-12 if dtype is torch.float64 else 0.03)
    if rows > 1:
        assert_same(given | {"positions": torch.stack([positions[0], positions[0].flip(0)])}, tolerance=0.03)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize(("start", "rows"), [(0, 5), (7, 5), (12, 1), (0, 13)])
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 2e-5), (torch.float64, 1e-11)])
def test_every_key_may_have_gradient(dtype, tol, heads, start, rows, window, softcap):
    """In rounds of all rows: consecutive rows, whose three gradients come from the same scores."""
    query = torch.randn(2, heads, rows, 8, dtype=dtype, requires_grad=True)
    key, value = (torch.randn(2, 2, 13, 8, dtype=dtype) for _ in range(2))
    live = query, key.clone().requires_grad_(), value.clone().requires_grad_()
    positions, columns = torch.arange(start, start + rows).expand(2, -1), torch.arange(13).expand(2, -1)
    options = {"columns": columns, "visibility": Visibility(causal=True, window=window), "softcap": softcap}
    grad = torch.randn(2, heads, rows, 8, dtype=dtype)
    found, expected = (
        torch.autograd.grad(attend(*live, key, value, positions, **options), live, grad)
        for attend in (selected_attention, definition)
    )
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tol)


def test_columns_after_all_rows_have_no_gradient():
    last = {"positions": torch.tensor([[1, 2]]), "columns": torch.tensor([[1, 9, 12]])}
    given = operands(1, 4, 2, 2, 13, causal=True, columns=last["columns"]) | last
    found = grads(attend, given, torch.ones(1, 4, 2, 8).double())
    assert found["row_value"][:, :, 0].any() and not found["row_value"][:, :, 1:].any()
    assert_same(given)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 4e-3)])
def test_narrow_dtypes_accumulate_in_float32(dtype, tolerance):
    """The tolerance is a few roundings of operands and result: 2^-8 of bfloat16, 2^-11 of float16."""
    for softcap in (0.0, 2.0):
        given = operands(1, 4, 2, 40, 200, 16, dtype=dtype, causal=True, softcap=softcap)
        assert_same(given, tolerance=tolerance)
        assert attend(**given).dtype is dtype


def test_foreign_keys_need_no_positions():
    given = operands(rows=5, tokens=9)
    assert_same(given | {"row_key": None, "row_value": None, "positions": None})


def test_a_row_without_visible_keys_is_zero_and_has_no_gradient():
    mask = torch.ones(1, 1, 5, 13, dtype=torch.bool)
    mask[..., 2, :] = False
    for hiding in (mask, torch.zeros(mask.shape).double().masked_fill(~mask, -torch.inf)):
        given = operands(mask=hiding)
        found = grads(attend, given, torch.ones(2, 4, 5, 8).double())
        assert not found["out"][:, :, 2].any() and not found["query"][:, :, 2].any()
        assert_same(given)


def test_a_row_of_the_least_number_is_a_mean_as_in_scaled_dot_product_attention():
    least = torch.full((1, 1, 1, 13), torch.finfo(torch.float32).min)
    given = operands(dtype=torch.float32, mask=least)
    assert torch.allclose(attend(**given)[:, 0], given["value"].mean(2)[:, :1], atol=1e-6)


def fully_masked_rows(given: dict) -> Tensor:
    """All of the last instance, and every other row."""
    batch, _, rows, _ = given["query"].shape
    return (torch.arange(rows) % 2 == 1) | (torch.arange(batch)[:, None] == batch - 1)


def least_added(
    query, row_key, row_value, key, value, positions, *, columns=None, causal, softcap, scale, fully_masked, scored
):
    """Attention as in models: the least finite number is added to masked scores, or replaces them."""
    at = (positions if columns is None else columns)[:, None, :, None]
    key, value = (t.scatter(2, at.expand(r.shape), r) for t, r in ((key, row_key), (value, row_value)))
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    scores = query @ key.mT * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    later = torch.arange(key.shape[2]) > positions[:, None, :, None]
    hidden, least = (later & causal) | fully_masked[:, None, :, None], torch.finfo(scores.dtype).min
    added = torch.zeros_like(scores).masked_fill(hidden, least)
    return torch.softmax(scores + added if scored else scores.masked_fill(hidden, least), -1) @ value


@given(
    causal=st.booleans(),
    softcap=st.sampled_from([0.0, 2.0]),
    scored=st.booleans(),
    foreign=st.booleans(),
    rows=st.sampled_from([1, 7, 70]),
    key_heads=st.sampled_from([1, 2, 4]),
)
@settings(max_examples=20, deadline=None)
def test_fully_masked_rows_get_the_mean_and_the_gradient_of_models(causal, softcap, scored, foreign, rows, key_heads):
    columns = rows_of(2, 4, 80) if foreign else None
    given = operands(key_heads=key_heads, rows=rows, tokens=80, columns=columns, causal=causal, softcap=softcap)
    given |= {"scale": 0.7, "fully_masked": fully_masked_rows(given), "scored": scored}
    direction = torch.randn(2, 4, rows, 8, dtype=torch.float64)
    want = grads(least_added, given, direction)
    for function in (attend, define):
        for name, got in grads(function, given, direction).items():
            assert torch.allclose(got, want[name], rtol=1e-10, atol=1e-12), (function, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fully_masked_rows_of_half_precision(dtype):
    """The tolerance is that of narrow dtypes above."""
    given = operands(1, 4, 2, 40, 200, 16, dtype=dtype, causal=True)
    given |= {"fully_masked": fully_masked_rows(given), "scored": True}
    assert_same(given, tolerance=0.03 if dtype is torch.bfloat16 else 4e-3)


def test_fully_masked_rows_without_gradient_for_keys():
    given = operands(rows=5, tokens=9)
    given |= {"fully_masked": fully_masked_rows(given), "scored": True}
    assert_same(given | {"row_key": None, "row_value": None, "positions": None})


def form_of(given: dict) -> tuple:
    """The operator's arguments as the public function passes them."""
    columns = given["positions"] if given["row_key"] is not None else None
    named = {"columns": columns, "sinks": None, "scale": None, "softcap": 0.0} | given
    names = ("query", "row_key", "row_value", "key", "value", "positions", "columns", "sinks", "scale", "softcap")
    return *(named[name] for name in names), *visibility_of(given).flat()


@pytest.mark.parametrize("rows_live", [True, False])
def test_operators_pass_opcheck(rows_live):
    given = operands(
        dtype=torch.float32, causal=True, window=9, segments=torch.zeros(2, 13).long(), sinks=torch.ones(4)
    )
    given |= {"mask": torch.rand(2, 1, 1, 13) < 0.9} | ({} if rows_live else {"row_key": None, "row_value": None})
    live = {n: given[n].detach().requires_grad_() for n in GRADS if given[n] is not None}
    torch.library.opcheck(OP, form_of(given | live))
    query, _, _, key, value, positions, columns, _, *form = form_of(given)
    grad, lse = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5) + 4
    operand = (grad, lse - 4, lse, query, key, value, positions)
    torch.library.opcheck(torch.ops.tokenseek_fx.selected_attention_grad_query, (*operand, *form))
    if rows_live:
        inputs = (*operand, columns, *form)
        torch.library.opcheck(torch.ops.tokenseek_fx.selected_attention_grad_keys, inputs)
    operand = (grad, query, key, value, columns, fully_masked_rows(given), True, *form[:2])
    torch.library.opcheck(torch.ops.tokenseek_fx.selected_attention_grad_blind, operand)


def test_fake_tensors_have_the_layout_of_real_ones():
    with FakeTensorMode() as mode:
        given = operands(causal=True)
        fake = attend(**given)
    assert mode is not None
    real = attend(**operands(causal=True))
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    assert real.transpose(1, 2).is_contiguous()


def test_one_operation_in_a_graph_traced_before_autograd():
    given = operands(causal=True)
    names = list(given)[:6]

    def run(*tensors):
        return attend(**dict(zip(names, tensors, strict=True)), causal=True)

    gm = make_fx(run, pre_dispatch=True, tracing_mode="fake")(*(given[n] for n in names))
    calls = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    assert calls.count(OP.default) == 1 and len(calls) == 3
    assert_same(given, lambda causal, **tensors: gm(*tensors.values()))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_with_dynamic_shapes(backend):
    torch._dynamo.reset()
    compiled = torch.compile(selected_attention, backend=backend, dynamic=True, fullgraph=True)
    for rows, tokens in [(5, 13), (9, 31)]:
        sinks = torch.randn(4, dtype=torch.float64)
        given = operands(rows=rows, tokens=tokens, causal=True, sinks=sinks)
        assert_same(given, lambda **given: call(compiled, given))


def saved_bytes(out: Tensor) -> int:
    return sum(
        t.untyped_storage().nbytes()
        for t in {t.data_ptr(): t for t in out.grad_fn.saved_tensors if t is not None}.values()
    )


def test_saves_its_operands_once_and_nothing_of_rows_by_keys():
    given = operands(1, 4, 2, 20, 400, 8, dtype=torch.float32, causal=True)
    given |= {name: given[name].requires_grad_() for name in GRADS[:3]}
    out = attend(**given)
    kept = ("query", "key", "value", "positions")
    floor = sum(given[name].nbytes for name in kept) + out.nbytes + 4 * 20 * 4
    assert saved_bytes(out) == floor


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_no_tensor_of_rows_by_keys_exists(softcap):
    given = operands(1, 4, 2, 256, 8192, 8, dtype=torch.float32, causal=True, softcap=softcap)
    query, _, _, key, value, positions, columns, *_ = form_of(given)
    spec = blocks.ScoreSpec.of(query, key, positions, visibility_of(given), None, softcap)
    with Largest() as largest:
        out, lse = blocks.forward(query, key, value, None, spec)
        delta = (out * out).sum(-1)
        blocks.grad_query(out, delta, lse, query, key, value, spec)
        blocks.grad_keys(out, delta, lse, query, key[:, :, :256], value[:, :, :256], spec.at(columns))
    assert 0 < largest.bytes <= 4 * blocks._SCORES < 256 * 8192 * 4


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_fewer_rows_with_many_keys_are_computed_at_a_time(softcap, monkeypatch):
    given = operands(2, 4, 2, 90, 200, causal=True, softcap=softcap)
    monkeypatch.setattr(blocks, "_SCORES", 4096)  # of 64 rows that see up to 200 keys: 10 at a time
    assert_same(given)


def test_keys_after_the_last_row_of_a_block_are_not_read():
    """They may have any value."""
    given = operands(1, 4, 2, 40, 200, causal=True)
    given["positions"] = torch.arange(0, 80, 2)[None]
    for name in ("key", "value"):
        given[f"row_{name}"] = given[name][:, :, :80:2].clone()
        given[name][:, :, 80:] = torch.nan
    found = grads(attend, given, torch.ones(1, 4, 40, 8).double())
    assert all(x.isfinite().all() for x in found.values())
    given["positions"] = given["positions"] + 2  # the last row sees the first of them
    assert grads(attend, given, torch.ones(1, 4, 40, 8).double())["out"].isnan().any()


def test_results_repeat():
    given = operands(2, 8, 2, 300, 900, 16, dtype=torch.float32, causal=True, window=400)
    direction = torch.randn(2, 8, 300, 8)
    first, second = (grads(attend, given, direction) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"query": torch.randn(2, 3, 5, 8).double()}, "3 query heads can't share 2"),
        ({"value": torch.randn(2, 2, 12, 8).double()}, "don't match"),
        ({"value": torch.randn(2, 2, 13, 8)}, "one dtype"),
        ({"row_value": None}, "Pass both or none"),
        ({"positions": None}, "need the positions"),
        ({"mask": torch.zeros(13, requires_grad=True)}, "gives it no gradient"),
        ({"sinks": torch.zeros(4), "fully_masked": torch.ones(2, 5).bool()}, "Pass one of them"),
    ],
)
def test_operands_that_do_not_fit_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        attend(**(operands() | wrong))


@pytest.fixture
def triton_attention(monkeypatch):
    """The Triton kernels: on the GPU if there is one, otherwise in Triton's interpreter (see conftest.py)."""
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        reason = (
            "the interpreter of Triton 3.6 can't loop up to a number that a kernel computes, with numpy 2.4 and newer"
        )
        pytest.importorskip("triton", "3.7", reason=reason)
    from tokenseek_fx.ops import attention, attention_triton

    monkeypatch.setattr(attention, "_operator", lambda query, value: attention_triton.forward)

    def run(**given):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return attend(**{n: t.to(device) if torch.is_tensor(t) else t for n, t in given.items()}).cpu()

    return run


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(given=cases(dtypes=(torch.float32, torch.float16), most=2))
def test_kernels_equal_the_definition(triton_attention, given):
    assert_same(given, triton_attention, 1e-5 if given["query"].dtype is torch.float32 else 4e-3)


def test_kernels_go_through_all_blocks_of_rows_and_keys(triton_attention):
    """More rows and keys than a block of any kernel: some blocks are fully visible, some partly, some skipped."""
    base = {"dtype": torch.float32, "width": 16, "causal": True}
    made = [operands(1, 4, 2, 90, 160, **base), operands(1, 3, 1, 70, 300, window=60, **base)]
    made += [operands(1, 3, 1, 70, 300, window=60, **(base | {"causal": False}))]
    made += [operands(1, 2, 2, 40, 130, **(base | {"causal": False})), operands(1, 2, 1, 60, 60, **base)]
    for case in made:
        assert_same(case, triton_attention, 1e-5)


@pytest.mark.parametrize("scored", [False, True])
def test_kernels_leave_fully_masked_rows_to_their_mean(triton_attention, scored):
    given = operands(2, 4, 2, 9, 40, 16, dtype=torch.float32, causal=True, softcap=2.0)
    assert_same(given | {"fully_masked": fully_masked_rows(given), "scored": scored}, triton_attention, 1e-5)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(
    ("width", "dtype"),
    [(n, torch.float16) for n in (32, 64, 96, 128, 256)] + [(n, torch.float32) for n in (32, 64, 96, 128)],
)
def test_kernels_take_heads_of_every_width(triton_attention, width, dtype, by_row):
    """Each with its own blocks, more keys than a block, and a mask by row or none."""
    mask = torch.rand(1, 1, 20, 150) < 0.8 if by_row else None
    given = operands(1, 2, 1, 20, 150, width, width, dtype, causal=True, mask=mask)
    assert_same(given, triton_attention, 1e-5 if dtype is torch.float32 else 4e-3)


def test_kernels_do_not_read_blocks_of_keys_after_their_last_row(triton_attention):
    """They may have any value; a block has at most 128 keys."""
    given = operands(1, 2, 1, 20, 400, 16, 16, torch.float32, causal=True)
    given["positions"] = torch.arange(20)[None]
    for name in ("key", "value"):
        given[f"row_{name}"] = given[name][:, :, :20].clone()
        given[name][:, :, 128:] = torch.nan
    found = grads(triton_attention, given, torch.ones(1, 2, 20, 16))
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("width", [20, 72])
def test_kernels_pad_heads_to_a_power_of_two(triton_attention, width):
    assert_same(operands(1, 2, 1, 9, 20, width, 24, torch.float32, causal=True), triton_attention, 1e-5)


def test_kernels_take_any_layout(triton_attention):
    given = operands(dtype=torch.float32, causal=True)
    given["query"], given["key"] = given["query"].contiguous(), given["key"].mT.contiguous().mT
    given["value"] = given["value"].contiguous()
    assert_same(given, triton_attention, 1e-5)


SEEN = """
import types
import torch, triton
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from tokenseek_fx.ops import attention, attention_triton
from tokenseek_fx.ops.visibility import Visibility

triton.runtime.driver.set_active(types.SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32)))
attention._operator = lambda query, value: attention_triton.forward

class Loss(torch.nn.Module):
    def forward(self, *operands):
        return (attention.selected_attention(*operands, visibility=Visibility(causal=True)).sum(),)

def rows(heads, rows):
    return torch.empty(2, rows, heads, 16).transpose(1, 2)

with FakeTensorMode():
    live = [rows(n, 5).requires_grad_() for n in (4, 2, 2)]
    operands = (*live, rows(2, 13), rows(2, 13), torch.zeros(2, 5, dtype=torch.int64))
    gm, _ = aot_export_module(Loss(), operands, trace_joint=True, output_loss_index=0)
kernels = [n for n in gm.graph.nodes if n.target is torch.ops.higher_order.triton_kernel_wrapper_functional]
print(*(",".join(sorted(use.args[1] for use in kernel.users)) for kernel in kernels))
"""


def test_a_graph_sees_into_the_kernels(tmp_path):
    """Inductor gets the kernels themselves, which write only what they return.

    An operand that seems to be written would be copied.
    """
    pytest.importorskip("triton")
    (tmp_path / "seen.py").write_text(SEEN)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, tmp_path / "seen.py"], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["lse,out", "out", "grad_key,grad_value"], done.stderr
