"""The ditch stream compiled block by block: exact, and its gradients leave the backward block by block."""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass, replace

import pytest
import torch
from compare import assert_matches, by_reference, compiled, error, grads_of
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from programs import rewritten
from test_backend import D, Model, T, compile_eager, data
from test_pipeline import captured
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import tokenseek_fx
from tokenseek_fx.passes import Pipeline, Program, Split
from tokenseek_fx.passes.graph.errors import InvariantBroken
from tokenseek_fx.passes.graph.kinds import BLOCK
from tokenseek_fx.passes.lower.split import Segments
from tokenseek_fx.passes.streams.rounds import Rounds
from tokenseek_fx.passes.streams.trace import Rewrite

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def split(model: nn.Module, **options) -> Segments:
    return rewritten(captured(model, data()), keep_ratio=0.3, until="split", **options)[Segments]


class Autocast(Model):
    """An autocast region around all blocks, as accelerate puts it."""

    def forward(self, ids, labels=None):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(ids, labels)


# -- segments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "count"), [(1, 3), (2, 5), (4, 7)])
def test_the_seek_stream_the_embedding_every_block_and_the_head_are_segments(layers, count):
    """The end of a single block is unknown, so the head stays with it."""
    assert len(split(Model(layers=layers)).segments) == count


@pytest.mark.parametrize("options", [{}, {"kv_grad": "all"}, {"logits": "drop"}])
def test_identical_blocks_are_equal_graphs(options):
    blocks = split(Model(layers=4), **options).segments[2:-1]
    assert len(blocks) == 4 and len({part.run.code for part in blocks}) == 1
    assert not any(BLOCK in node.meta.get("custom", {}) for part in blocks for node in part.run.graph.nodes)


@pytest.mark.parametrize("model", [Model, Autocast])
def test_the_first_segment_carries_no_gradient_and_all_others_do(model):
    carry = []

    def look(part, taken, given):
        carry.append({x.requires_grad for x in given})

    split(model()).on_examples(look)
    assert carry[0] == {False} and carry[1:] == [{True}] * 4


class OneProduct(Model):
    """Attention whose keys and values are all of one product; if ``whole``, it has the queries too and is returned."""

    def __init__(self, whole: bool) -> None:
        super().__init__(layers=0)
        self.whole, self.query, self.context = whole, nn.Linear(D, D), nn.Linear(D, 3 * D if whole else 2 * D)
        self.double()

    def forward(self, ids, labels=None):
        x = self.embed(ids) + self.position
        product = self.context(x)
        q, k, v = (part[:, None] for part in (self.query(x), *product.chunk(3 if self.whole else 2, -1)[-2:]))
        loss = self.loss(x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0], labels)
        return (loss, product.detach()) if self.whole else loss


def copies(model: nn.Module) -> int:
    return sum(node.target is aten.clone.default for node in split(model).segments[0].gives)


def test_keys_and_values_that_are_slices_of_a_larger_product_are_copied_if_nothing_else_keeps_it():
    first = split(Model()).segments[0]
    assert all(node.meta["val"].untyped_storage().nbytes() == node.meta["val"].nbytes for node in first.gives)
    assert copies(Model()) == 4 and not copies(OneProduct(whole=False)) and not copies(OneProduct(whole=True))


def test_a_value_is_freed_after_the_last_segment_that_reads_it():
    segments = split(Model(layers=3))
    let_go = [key for part in segments.segments for key in part.last]
    taken = {key for part in segments.segments for key in part.takes}
    assert len(let_go) == len({*let_go}) and {*let_go} == taken - {*segments.outputs}


def layouts(segments: Segments) -> list[tuple[int, ...]]:
    found = []
    segments.on_examples(lambda part, taken, given: found.extend(x.stride() for x in given))
    return found


def test_outputs_of_a_compiled_segment_have_the_layout_that_later_ones_are_compiled_for():
    """Whatever layout the compiler chose: here all dims in reverse order, and a stride of two in the last."""

    def compile(number, part, taken):
        return lambda *args: [x.mT.repeat_interleave(2, -1)[..., ::2].mT if x.ndim > 1 else x for x in part(*args)]

    segments = split(Model())
    assert len({*layouts(segments)}) > 3 and layouts(segments.compiled(compile)) == layouts(segments)


def test_segments_include_bodies_of_higher_order_operators():
    """In the first segment and in a block, which call the same one."""
    root = nn.Module()
    root.body = fx.symbolic_trace(lambda x: (x.sin(),))
    graph = fx.Graph()
    x, w, body = graph.placeholder("x"), graph.placeholder("w"), graph.get_attr("body")

    def call(target, *args, block=0):
        node = graph.call_function(target, args)
        node.meta["custom"] = {BLOCK: block}
        return node

    def inside(value, block):
        return call(lambda body, value: body(value)[0], body, value, block=block)

    first = inside(call(aten.cos.default, x), 0)
    graph.output((inside(call(aten.mul.Tensor, first, w, block=1), 1),))
    module = fx.GraphModule(root, graph)
    inputs = (torch.randn(3), torch.randn(3, requires_grad=True))
    program = Program(module, inputs).with_(Rewrite(module, inputs, (), ()), Rounds())
    segments = Pipeline((Split(),)).run(program)[Segments]
    assert [[*part.run._modules] for part in segments.segments] == [["body"], ["body"]]
    assert segments(*inputs)[0].equal(module(*inputs)[0])


def test_a_segment_never_reads_an_output_of_a_later_one():
    """A node that was traced before its inputs belongs to the later block."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    late = graph.call_function(aten.sin.default, (x,))
    late.meta["custom"] = {BLOCK: 2}
    early = graph.call_function(aten.cos.default, (late,))
    early.meta["custom"] = {BLOCK: 1}
    graph.output((early,))
    module = fx.GraphModule(nn.Module(), graph)
    program = Program(module, ()).with_(Rewrite(module, (torch.ones(2),), (), ()), Rounds())
    program = Split().run(program)
    assert len(program[Segments].segments) == 1
    Split().check(program)
    turned = program.with_(replace(program[Segments], placeholders=()))
    with pytest.raises(InvariantBroken, match="takes a value that a later one gives"):
        Split().check(turned)


# -- equal to the reference -------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    layers=st.integers(1, 3),
    tied=st.booleans(),
    kept=st.integers(1, T - 1),
    causal=st.booleans(),
    options=st.fixed_dictionaries(
        {
            "kv_grad": st.sampled_from(["selected", "all"]),
            "report_loss": st.sampled_from(["full", "kept"]),
            "scorer": st.sampled_from(["random", "loss", "tokenseek"]),
            "inner": st.just("eager"),
        }
    ),
)
@example(3, True, 4, True, {"kv_grad": "all", "report_loss": "full", "scorer": "tokenseek", "inner": "aot_eager"})
def test_gradients_are_those_of_the_reference(layers, tied, kept, causal, options):
    """Embeddings tied to the head get theirs from two segments."""
    model = Model(layers=layers, tied=tied, causal=causal)
    blocks = "blocks" if options["kv_grad"] == "all" else None
    assert_matches(model, data(), 1e-9, length=T, open_blocks=blocks, keep_ratio=kept / T, select="topk", **options)


def test_an_autocast_region_around_all_blocks_is_cut_with_them():
    assert len(split(Autocast(layers=3)).segments) == 6
    model = Autocast(layers=3).float()
    run = compiled(model, data(), inner="aot_eager")
    expected = by_reference(model, data(), run.indices, T)
    whole = compiled(Model(layers=3).float(), data(), inner="aot_eager")
    assert error(run.grads, expected.grads) < 3e-2  # bfloat16: sums over rows in another order
    assert error(whole.grads, expected.grads) > 0, "without autocast the gradients are others"


class Centred(Model):
    """A running mean, written and then read between the blocks."""

    def __init__(self) -> None:
        super().__init__(layers=3)
        self.register_buffer("mean", torch.zeros(D, dtype=torch.float64))

    def forward(self, ids, labels=None):
        x = self.embed(ids) + self.position
        for block in self.blocks:
            x = block(x)
            self.mean.mul_(0.9).add_(x.detach().mean((0, 1)), alpha=0.1)
            x = x - self.mean
        return self.loss(x, labels)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_buffers_are_updated_once_a_step_as_in_the_full_forward(inner):
    model, batch = Centred(), data()
    expected = copy.deepcopy(model)
    step = compile_eager(model, inner=inner, strict=True)
    for _ in range(2):
        model.zero_grad(), expected.zero_grad()
        with tokenseek_fx.record() as rec:
            step(**batch).backward()
        with tokenseek_fx.reference.ditching(expected, rec[0].indices, length=T):
            expected(**batch).backward()
        torch.testing.assert_close(model.mean, expected.mean, rtol=1e-12, atol=0)
        assert error(grads_of(model), grads_of(expected)) < 1e-9


# -- the backward, block by block -------------------------------------------------------------------------------------


class Kept:
    """A tensor that autograd saved."""

    def __init__(self, tensor: Tensor, known: weakref.WeakSet) -> None:
        self.tensor = tensor
        known.add(self)


def test_gradients_come_block_by_block_and_keys_and_values_are_freed_with_them():
    """With existing gradients: a block's new ones are added, and its keys and values freed, before the next block's."""
    model, batch, seen = Model(layers=3), data(), []
    step = compile_eager(model, inner="aot_eager", strict=True)
    step(**batch).backward()
    saved: weakref.WeakSet[Kept] = weakref.WeakSet()

    def keys_and_values() -> int:
        tensors = [kept.tensor for kept in saved]
        return sum(x.is_floating_point() and x.ndim >= 3 and T in x.shape[1:] for x in tensors)

    def look(name: str) -> None:
        place = ".".join(name.split(".")[: 2 if name.startswith("blocks") else 1])
        if (place, keys_and_values()) not in seen:
            seen.append((place, keys_and_values()))

    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: look(name))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: Kept(x, saved), lambda kept: kept.tensor):
        loss = step(**batch)
    assert keys_and_values() == 6
    loss.backward()
    *blocks, one, other = seen
    assert blocks == [("lm_head", 6), ("blocks.2", 4), ("blocks.1", 2), ("blocks.0", 0)]
    assert {one, other} == {("embed", 0), ("position", 0)}


# -- compiled by Inductor ---------------------------------------------------------------------------------------------


@dataclass
class Step:
    """Compiling and running a step with Inductor: the graphs that it compiled, the bytes that autograd saved."""

    compiled: int
    saved: int
    explained: int


@pytest.fixture(scope="module")
def step() -> Step:
    torch._dynamo.reset()
    counters.clear()
    model, batch, storages = Model(layers=3).float(), data(), {}
    options = {"inner": "inductor", "scorer": "strided", "keep_ratio": 0.4}

    def keep(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with fresh_cache():
        run = compile_eager(model, **options, strict=True)
        run(**batch).backward()
        count = counters["inductor"]["fxgraph_cache_miss"]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = run(**batch)
    known = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *batch.values())}
    saved = sum(size for place, size in storages.items() if place not in known)
    del loss
    return Step(count, saved, tokenseek_fx.explain(model, **batch, options=options).rewritten.bytes)


def test_inductor_compiles_one_of_several_identical_blocks(step):
    """One of three blocks; forward and backward of block, embedding and head, and the seek stream."""
    assert step.compiled == 7


def test_explain_counts_what_all_segments_save_and_every_tensor_once(step):
    assert step.saved == step.explained
