"""Passes as values: alone, in order, stopped, checked; and what they must not lose."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from programs import analysed, planned, rewritten
from test_backend import B, Model, T, data
from torch.fx.experimental.proxy_tensor import make_fx

import tokenseek_fx
from tokenseek_fx import TokenSeekWarning
from tokenseek_fx.passes import (
    AuditSaved,
    Canonicalize,
    FindActivity,
    FindTokenAxes,
    Pipeline,
    Program,
    training,
)
from tokenseek_fx.passes.analysis.activity import Activity
from tokenseek_fx.passes.analysis.blocks import Blocks
from tokenseek_fx.passes.analysis.token_axes import TokenAxes
from tokenseek_fx.passes.graph.errors import GraphNotSupported, InvariantBroken
from tokenseek_fx.passes.graph.program import module_path, source_line
from tokenseek_fx.passes.lower.split import Segments
from tokenseek_fx.passes.memory import saved
from tokenseek_fx.passes.memory.saved import Audit
from tokenseek_fx.passes.rows.rules import ROWS_RULES
from tokenseek_fx.passes.rules.op import AXES_RULES
from tokenseek_fx.passes.streams.trace import Rewrite
from tokenseek_fx.passes.streams.two_streams import TwoStreams


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def captured(model: torch.nn.Module, batch: dict) -> Program:
    """Dynamo's graph of a model, outside of any compilation: fake inputs of its own."""
    found = []

    def look(gm, inputs):
        found.append(analysed(Program(gm, tuple(inputs))))
        return gm

    torch.compile(model, backend=look, fullgraph=True)(**batch)
    return found[0]


def eager_graph() -> Program:
    """A graph traced by make_fx, without Dynamo, modules or names: the passes work on any traced graph."""

    def forward(x, w, out):
        q, k, v = (x @ w).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return ((x + y @ out) ** 2).sum()

    torch.manual_seed(0)
    x, w, out = torch.randn(3, 5, 8), torch.randn(8, 24, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    return Program(make_fx(forward, pre_dispatch=True)(x, w, out), (x, w, out))


def test_prints_itself():
    lines = str(training(planned())).splitlines()
    names = [step.name for step in training(planned()).passes]
    assert [line.split(". ")[1].split(":")[0] for line in lines] == names


def test_stops_after_any_pass_and_shows_each():
    seen = []
    pipeline = training(planned())
    program = pipeline.run(eager_graph(), until="activity", after=lambda step, _: seen.append(step.name))
    assert seen == ["canonicalize", "unshift labels", "activity"] and program.done == tuple(seen)
    assert program[Activity] is not None and program.get(TokenAxes) is None
    with pytest.raises(ValueError, match="No pass is called 'axis'; the passes are: canonicalize"):
        pipeline.run(eager_graph(), until="axis")
    with pytest.raises(KeyError, match="No pass has written TokenAxes yet; passes that ran: canonicalize, unshift"):
        program[TokenAxes]


def test_the_backend_runs_the_pipeline_that_is_printed(monkeypatch):
    """The whole pipeline for own and for given rows, explain with the audit added, seek up to the two streams."""
    ran = []
    run = Pipeline.run

    def spy(self, program, *args, **kwargs):
        program = run(self, program, *args, **kwargs)
        ran.append(program.done)
        return program

    monkeypatch.setattr(Pipeline, "run", spy)
    names, model, options = [step.name for step in training(planned()).passes], Model(), {"inner": "eager"}
    step = torch.compile(model, backend="tokenseek", options=options)
    step(**data())
    assert [*ran[-1]] == names
    with tokenseek_fx.selecting(torch.arange(3).expand(B, -1)):
        step(**data())
    assert [*ran[-1]] == names
    tokenseek_fx.explain(model, **data(), options=options)
    assert [*ran[-1]] == [*names, "saved tensors"]
    tokenseek_fx.seek(model, **data(), options=options)
    assert [*ran[-1]] == [*names[: names.index("two streams") + 1], "trace"]


def test_continues_after_the_passes_that_ran():
    seen = []
    program = training(planned()).run(eager_graph(), until="activity")
    training(planned()).run(program, until="blocks", after=lambda step, _: seen.append(step.name))
    assert seen == ["token axes", "routing", "moved rows", "blocks"]


def test_one_by_one_on_a_graph_without_modules():
    program = eager_graph()
    plain = program.module(*program.inputs)
    for step in (*training(planned(keep_ratio=1.0, recompute="none")).passes, AuditSaved()):
        program = step.run(program)
        step.check(program)
    loss, scores, indices = program[Rewrite].module(*eager_graph().inputs)
    torch.testing.assert_close(loss, plain)
    assert scores.shape == (3, 5) and indices.tolist() == [list(range(5))] * 3
    assert {edge.kind for edge in program[Audit].edges} == {"rows", "select"}


def test_the_two_streams_run_without_being_traced():
    program = rewritten(eager_graph(), keep_ratio=0.6)
    inputs = eager_graph().inputs
    traced, executed = program[Rewrite].module(*inputs), program[TwoStreams].run(*inputs).flat
    for one, other in zip(traced, executed, strict=True):
        torch.testing.assert_close(one, other)


def test_an_error_names_the_pass():
    class Failing(FindActivity):
        def run(self, program):
            raise GraphNotSupported("It fails.")

    with pytest.raises(GraphNotSupported, match=r"It fails\. \(pass 'activity'\)"):
        Pipeline((Canonicalize(), Failing())).run(eager_graph())


def fail(*args):
    raise KeyError("a rule fails")


@pytest.mark.injects_faults
@pytest.mark.parametrize(
    ("table", "name"), [(AXES_RULES, "token axes"), (ROWS_RULES, "trace")], ids=["axes rule", "row rule"]
)
def test_an_error_at_a_node_names_its_pass_its_node_its_module_and_the_line(table, name, monkeypatch):
    """The error keeps its type, and the backend falls back with all of this in its warning."""
    monkeypatch.setitem(table, torch.ops.aten.embedding.default, fail)
    place = rf"a rule fails.* at embed \(test_backend\.py:\d+\) \(pass '{name}', node 'embedding'\)"
    with pytest.warns(TokenSeekWarning, match=place):
        torch.compile(Model(), backend="tokenseek", options={"inner": "eager"})(**data())


def test_a_broken_invariant_is_caught_between_passes():
    class Liar(FindTokenAxes):
        def run(self, program):
            program = super().run(program)
            node = program.graph.find_nodes(op="placeholder")[0]
            program[TokenAxes].axes[node] = (program[TokenAxes].axes[node][0][:1],)
            return program

    with pytest.raises(InvariantBroken, match="but axes"):
        Pipeline((Canonicalize(), FindActivity(), Liar())).run(eager_graph())


def test_a_concatenation_with_empty_tensors_is_its_other_operand():
    def forward(x):
        cache, whole = x.new_empty(0), x.new_empty(0, dtype=torch.float64)
        return torch.cat([cache, x], 1), torch.cat([whole, x], 1), torch.cat([x, x[:, :0]], 1)

    x = torch.randn(2, 3)
    program = Canonicalize().run(Program(make_fx(forward, pre_dispatch=True)(x), (x,)))
    (results,) = (node.args[0] for node in program.graph.nodes if node.op == "output")
    assert results[0] is results[2] and results[0].op == "placeholder"  # the other has a dtype different from x
    for is_now, was in zip(program.module(x), forward(x), strict=True):
        assert torch.equal(is_now, was) and is_now.dtype == was.dtype


@torch.library.custom_op("tokenseek_test::dropout", mutates_args=())
def of_the_user(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@of_the_user.register_fake
def _(x):
    return torch.empty_like(x)


def test_dropout_of_0_is_removed_and_operations_of_other_libraries_stay():
    def forward(x):
        return torch.nn.functional.dropout(x, 0.0), torch.ops.tokenseek_test.dropout(x)

    x = torch.randn(2, 3)
    program = Canonicalize().run(Program(make_fx(forward, pre_dispatch=True)(x), (x,)))
    assert [node.op for node in program.outputs] == ["placeholder", "call_function"]


def test_places_survive_every_pass():
    """Every call of the analysed graph has a module path and a source line.

    After it, every call has them except scoring and selection.
    """
    program = captured(Model(), data())
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    assert all(source_line(node) for node in calls)
    assert {module_path(node) for node in calls} >= {"blocks.0.qkv", "blocks.1.norm2", "lm_head"}
    graph = rewritten(program)[Rewrite].module.graph
    calls = [node for node in graph.nodes if node.op == "call_function"]
    ditched = [
        node for node in calls if node.meta.get("custom", {}).get("tokenseek") not in (None, "select", "scoring")
    ]
    assert len(ditched) > 30 and all(source_line(node) for node in ditched)
    assert {module_path(node) for node in ditched} >= {"blocks.0.qkv", "blocks.1.norm2", "lm_head"}


def test_blocks_by_dominators():
    program = captured(Model(layers=3), data())
    entries = program[Blocks].entries
    assert len(entries) == 3 and len(set(entries)) == 3
    assert program[Blocks].last_entry(program[TokenAxes], program[TokenAxes].main) is entries[-1]
    assert all(program[TokenAxes].has_rows(entry) and entry.meta["val"].shape == (B, T, 12) for entry in entries)
    assert [module_path(entry) for entry in entries[1:]] == ["blocks.0", "blocks.1"]


def test_heads_in_the_features_of_an_input_are_no_batch():
    """Without an output projection the residual add equates the input's features with heads x head dim."""

    def forward(x, w):
        q, k, v = (x @ w).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return ((x + y) ** 2).sum()

    x, w = torch.randn(3, 5, 8), torch.randn(8, 24, requires_grad=True)
    program = rewritten(Program(make_fx(forward, pre_dispatch=True)(x, w), (x, w)))
    assert program[Rewrite].module(x, w)[-1].shape == (3, 1)


def test_a_lost_edge_is_refused():
    """A big tensor frozen into the graph is not a literal: the values it was computed from are lost."""
    program = Canonicalize().run(eager_graph())
    Canonicalize().check(program)
    program.module.register_buffer("frozen", torch.randn(5, 5, 8))
    with program.graph.inserting_before(program.graph.output_node()):
        program.graph.get_attr("frozen")
    with pytest.raises(GraphNotSupported, match=r"shape \(5, 5, 8\) into a constant"):
        Canonicalize().check(program)


class Vmapped(Model):
    """torch.vmap in the forward, over values that carry gradient."""

    def loss(self, x, labels):
        return super().loss(torch.vmap(lambda row: row * 2 + 1)(x), labels)


def test_vmap_is_refused_loudly():
    """Retracing would turn it into a constant, so the plain graph runs, with a warning."""
    with pytest.warns(TokenSeekWarning, match=r"torch.func transform .* at .*test_pipeline.py:\d+"):
        torch.compile(Vmapped(), backend="tokenseek", options={"inner": "eager"})(**data()).backward()


def test_identical_segments_are_partitioned_once(monkeypatch):
    """Each reports what it saves at its own place, as if it were partitioned."""
    program = rewritten(captured(Model(layers=4), data()), until="recompute plan", recompute="none")
    partitioned, calls = saved.partitioned, []
    monkeypatch.setattr(saved, "partitioned", lambda *args: (calls.append(args), partitioned(*args))[1])
    once = AuditSaved().run(program)[Audit]
    shared = len(calls)
    monkeypatch.setattr(saved, "_likeness", lambda *args: object())
    each = AuditSaved().run(program)[Audit]
    assert shared < len(calls) - shared == len(program[Segments].segments)
    assert once == each and len({edge.place for edge in once.edges if "blocks." in edge.place}) > 4
