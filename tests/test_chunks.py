"""Chunks: token-parallel regions give the same results chunk by chunk; identical layers share a subgraph."""

from __future__ import annotations

import operator
from collections import Counter
from unittest import mock

import pytest
import torch
from architectures import INNER
from architectures import build as built
from compare import assert_matches, by_reference, compiled, error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_backend import Model, data
from test_lengths import assert_exact
from test_random import RATIOS, Transformer, batches, configurations
from test_routing import experts
from test_routing import model_and_batch as experts_model
from torch import nn
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from transformers import LlamaConfig, LlamaForCausalLM
from zoo import batch as batch_of
from zoo import build

from tokenseek_fx import compilation
from tokenseek_fx.compilation import backend
from tokenseek_fx.config import Config
from tokenseek_fx.passes.lower import chunks
from tokenseek_fx.passes.lower.chunks import Chunk
from tokenseek_fx.passes.lower.regions import Region
from tokenseek_fx.passes.lower.unalias import UnaliasOutputs
from tokenseek_fx.passes.streams.trace import Rewrite

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 31}
RELAXED = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@pytest.fixture
def small(monkeypatch):
    """Chunks of a few tokens; returns the rewritten modules."""
    seen = []
    run = Chunk.run

    def recorded(self, program):
        program = run(self, program)
        seen.append(program[Rewrite].module)
        return program

    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", 600)
    monkeypatch.setattr(Chunk, "run", recorded)
    return seen


@pytest.fixture
def inductor_for_chunks(monkeypatch):
    """Inductor compiles the segment of all tokens, which calls chunks; those of the kept rows are not compiled.

    Most kernels are those of the kept rows; ``test_models`` and ``test_inductor_runs_chunks_of_any_length`` compile
    them.
    """
    inner = compilation.inner_compiler

    def compiler(config, defaults=None):
        inductor = inner(config, defaults)
        return lambda gm, inputs: inductor(gm, inputs) if calls(gm) else gm.forward

    monkeypatch.setattr(compilation, "inner_compiler", compiler)


def calls(module) -> list[str]:
    """The subgraphs that are called, in order."""
    return [node.args[1] for node in module.graph.nodes if "invoke_subgraph" in str(node.target)]


def values(module) -> list[torch.Tensor]:
    """Examples of the tensors in a graph."""
    return [node.meta["val"] for node in module.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]


@settings(max_examples=6, **RELAXED)
@given(configurations(), batches(), RATIOS, st.sampled_from(["random", "loss", "tokenseek"]))
def test_chunks_equal_the_reference(small, configuration, batch, ratio, scorer):
    assert_matches(Transformer(configuration), batch, 1e-9, keep_ratio=ratio, scorer=scorer, inner="eager")


@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_models_in_chunks_equal_the_reference(small, name, padding):
    model = build(name, "sdpa").double()
    assert_matches(model, batch_of(model, 3, 13, padding), 1e-6, inner="aot_eager")
    assert len(calls(small[-1])) > 2


@pytest.mark.slow
@pytest.mark.usefixtures("inductor_for_chunks")
def test_inductor_runs_chunks_whose_queries_keys_and_values_are_views_of_one_product(small, monkeypatch):
    """Those of GPT-2: Inductor would overwrite the ones that are read later. Of Llama, see the layouts below."""
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", 1500)
    model = build("gpt2", "sdpa")
    assert_matches(model, batch_of(model, 3, 13, "right"), 1e-4, inner="inductor")
    assert calls(small[-1])


class ContiguousParts(nn.Module):
    """Queries, keys and values are slices of a contiguous tensor.

    A copy of a slice (as for the keys) differs from it only in its offset; the values are multiplied by one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(31, 16), nn.Linear(16, 31)
        self.product, self.mlp = nn.Linear(16, 48), nn.Linear(16, 64)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for _ in range(2):
            query, key, value = self.product(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).contiguous()
            y = nn.functional.scaled_dot_product_attention(
                query, key.clone(), value * torch.ones(8, dtype=x.dtype), is_causal=True
            )
            x = x + self.mlp(y.transpose(1, 2).flatten(2)).view(*x.shape, 4).amax(-1)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


@pytest.mark.usefixtures("inductor_for_chunks")
def test_inductor_runs_chunks_that_return_contiguous_slices(small, monkeypatch):
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", 1500)
    ids = torch.randint(31, (3, 13))
    assert_matches(ContiguousParts().double(), {"input_ids": ids, "labels": ids}, 1e-9, inner="inductor")
    assert calls(small[-1])


@pytest.mark.slow
@pytest.mark.usefixtures("inductor_for_chunks")
@pytest.mark.parametrize(
    ("name", "dtype", "tol"),
    [
        ("t5", torch.float64, 1e-5),  # computes partly in float32
        ("phi3", torch.float64, 1e-5),  # likewise
        ("torch_transformer", torch.float64, 1e-9),
        ("qwen3_moe", torch.float32, 1e-5),
    ],
)
def test_inductor_runs_chunks_that_return_slices(small, monkeypatch, name, dtype, tol):
    """Models whose chunks return slices in different ways.

    T5's projections are returned both as they are and by heads. Phi-3's values are the last slice of a product, and its
    keys are concatenated with an empty tensor. torch's cross-attention slices keys and values from one product, which
    Inductor leaves in place. Experts sort rows.
    """
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", 1500)
    model, batch = built(name, "sdpa", 13, dtype)
    if name == "t5":
        del model.encoder.block[1:], model.decoder.block[1:]
    run = compiled(model, batch, report_loss="kept", inner="inductor")
    length, others = run.selection.scores.shape[1], run.selection.others
    expected = by_reference(model, batch, run.indices, length, None, None, others)
    assert abs(run.loss - expected.loss) < tol
    assert error(run.grads, expected.grads) < tol
    assert calls(small[-1])


@pytest.mark.slow
@pytest.mark.usefixtures("inductor_for_chunks")
def test_computed_and_cut_chunks_have_different_layouts(small, monkeypatch):
    """The first region is not cut: its block's chunks are slices with the strides of the whole sequence.

    Those of the next block are not.
    """
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=4, use_cache=False)).train()
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", 13 * model.config.hidden_size * 4)
    assert_matches(model, batch_of(model, 1, 13, None), 1e-4, inner="inductor")
    assert len(calls(small[-1])) > 4


def test_identical_layers_share_a_subgraph(small):
    torch._dynamo.reset()
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=6, use_cache=False)).train()
    ids = torch.randint(31, (1, 24))
    torch.compile(model, backend=backend(Config(inner="eager", scorer="random", logits="drop", strict=True)))(
        input_ids=ids, labels=ids
    )
    called = calls(small[-1])
    assert len(called) > 12
    assert len({*called}) <= 4


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "modernbert tag", "vit"])
def test_only_outputs_of_all_tokens_exist_between_attentions(small, name):
    """Also with fused projections (cut by ``chunk``, ``split``, ``unbind`` or slices) and with a dropout of 0."""
    model, batch = built(name, "sdpa", 13, torch.float64)
    length, logits = (17, "keep") if name == "vit" else (13, "drop")
    assert_matches(model, batch, 1e-6, length, inner="eager", scorer="random", logits=logits)
    tokens = {length, 7 * length}
    assert not any({INNER, 2 * INNER} & {*value.shape} and tokens & {*value.shape} for value in values(small[-1]))


def test_experts_of_all_tokens_are_not_in_memory_at_once(small):
    model, batch = experts_model(experts)
    assert_matches(model, batch, 1e-9, length=13, inner="eager", scorer="loss", logits="drop")
    assert not any(3 * 13 * 2 in x.shape and x.is_floating_point() for x in values(small[-1]))


def test_a_view_of_a_value_of_concatenated_chunks_may_be_a_copy(small, monkeypatch):
    """Attention within a window has the layout of its queries; here the region after it is not cut."""
    can_stand = property(lambda region: region.nodes[0].target is not torch.ops.aten.view.default)
    monkeypatch.setattr(Region, "can_stand", can_stand)
    model, batch = built("modernbert tag", "sdpa", 13, torch.float64)
    assert_matches(model, batch, 1e-6, inner="eager")
    assert calls(small[-1])


def test_chunks_pass_from_region_to_region_without_concatenation(small):
    """Of a block's outputs, only keys and values, which every query sees, are concatenated."""
    model = build("llama", "sdpa")
    assert_matches(model.double(), batch_of(model, 3, 13, None), 1e-6, inner="eager", scorer="random", logits="drop")
    made = [node for node in small[-1].graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    parts = {node for node in made if node.target is operator.getitem and "invoke_subgraph" in str(node.args[0].target)}
    joined = [node.meta["val"] for node in made if parts & {*node.all_input_nodes} and "cat" in str(node.target)]
    keys = (3, model.config.num_key_value_heads, 13, model.config.head_dim)
    assert [x.shape for x in joined] == 2 * model.config.num_hidden_layers * [keys]


@pytest.mark.parametrize(("less", "queries"), [(0, {13}), (1, {6, 7})])
def test_attention_whose_output_fits_into_a_chunk_has_all_queries_at_once(small, monkeypatch, less, queries):
    model = build("llama", "sdpa")
    gives = 3 * 13 * model.config.hidden_size * 8
    assert gives < 3 * 13 * model.config.intermediate_size * 8 < 2 * gives  # the MLP is in two chunks
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", gives - less)
    assert_matches(model, batch_of(model, 3, 13, "right"), 1e-6, inner="eager", scorer="random", logits="drop")
    module = small[-1]
    bodies = {getattr(module, name) for name in calls(module)}
    attentions = [node for body in bodies for node in body.graph.nodes if "selected_attention" in str(node.target)]
    assert {node.args[0].meta["val"].shape[2] for node in attentions} == queries


def test_lengths_that_change_are_cut(small):
    """As many chunks at any length as the example needs; exact at every length."""
    torch._dynamo.reset()
    model = build("llama", "sdpa")
    config = Config(inner="eager", keep_ratio=0.3, chunk_bytes=6000, strict=True)
    step = torch.compile(model, backend=backend(config))
    for count, length in [(3, 13), (3, 19), (5, 23), (2, 17)]:
        assert_exact(step, model, batch_of(model, count, length, "right"), 1e-6)
    assert [len(calls(module)) > 2 for module in small] == 3 * [True]  # of this size; of any length; of any batch


@pytest.mark.slow
def test_inductor_runs_chunks_of_any_length(small):
    """One graph, with symbols for the sizes of ids, mask and labels."""
    torch._dynamo.reset()
    model = build("gpt2", "sdpa")
    del model.transformer.h[1:]
    config = Config(inner="inductor", keep_ratio=0.3, chunk_bytes=6000, strict=True)
    step = torch.compile(model, backend=backend(config))
    for count, length in [(3, 13), (5, 23), (2, 17)]:
        batch = batch_of(model, count, length, "right")
        for x in batch.values():
            torch._dynamo.maybe_mark_dynamic(x, (0, 1))
        assert_exact(step, model, batch, 1e-6)
    assert [len(calls(module)) > 2 for module in small] == [True]


def test_floats_that_are_dynamic(small):
    """With ``dynamic=True`` Dynamo reads the epsilon of a norm from a tensor: the norm is not cut, the rest is."""
    torch._dynamo.reset()
    model = build("llama", "sdpa").double()
    step = torch.compile(model, backend=backend(Config(inner="eager", keep_ratio=0.3, strict=True)), dynamic=True)
    for count, length in [(3, 13), (5, 23)]:
        assert_exact(step, model, batch_of(model, count, length, "right"), 1e-6)
    assert len(calls(small[-1])) > 2


def test_a_subgraph_that_several_chunks_call_copies_its_results_once():
    """A view of an input is copied; the calls of one body share it."""
    model, batch = built("gpt2", "sdpa", 13, torch.float64)
    bodies = []
    run = UnaliasOutputs.run

    def recorded(self, program):
        program = run(self, program)
        module = program[Rewrite].module
        calls_by_name = Counter(node.args[0].target for node in module.graph.nodes if node.target is invoke_subgraph)
        bodies.extend((count, getattr(module, name).graph) for name, count in calls_by_name.items())
        return program

    with mock.patch.object(UnaliasOutputs, "run", recorded), mock.patch.dict(chunks.CHUNK_BYTES, cpu=1500):
        assert_matches(model, batch, 1e-6, inner="eager")
    shared = [graph for count, graph in bodies if count > 1]
    copies = [[node for node in graph.nodes if "tokenseek_fx.copied" in str(node.target)] for graph in shared]
    assert any(copies)
    for graph, made in zip(shared, copies, strict=True):
        assert len(made) <= len(graph.output_node().args[0])
        assert not any(node in made for copy in made for node in copy.all_input_nodes)


RETURNING = {
    "broadcast_tensors": lambda x: torch.broadcast_tensors(x[..., :3].tanh(), x[..., 3:6])[0],
    "expand": lambda x: x[..., :3].tanh().expand(*x.shape[:2], 3).contiguous(),
    "to": lambda x: x[..., :3].tanh().to(x.dtype),
}


@pytest.mark.parametrize("name", RETURNING)
@pytest.mark.parametrize("batch", [2, 3])
def test_an_operation_that_returns_its_operand_may_be_cut_out(name, batch):
    """A tensor that an operation returns as it is has two nodes; mse_loss broadcasts its operands this way."""

    def head(self, x, labels):
        return torch.nn.functional.mse_loss(RETURNING[name](x), torch.zeros_like(x[..., :3]), reduction="sum")

    assert_matches(Model(head), data(batch), 1e-9, chunk_bytes=512)
