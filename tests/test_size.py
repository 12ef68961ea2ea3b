"""What the compiled graphs hold: no logits of all tokens, no attention weights, nothing that the scorer doesn't use."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
import transformers
from largest import Largest
from marks import slow
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import run_and_get_code

from tokenseek_fx import compilation
from tokenseek_fx.ops.received import attention_received
from tokenseek_fx.ops.visibility import Visibility

BATCH, HEADS, INNER, LAYERS = 2, 4, 88, 2
TOKENS, VOCAB = 520, 9001  # several chunks of logits at the default budget


def model(layers: int = LAYERS, tokens: int = TOKENS) -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": INNER, "num_hidden_layers": layers, "vocab_size": VOCAB}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": tokens}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, use_cache=False)).train()


@pytest.fixture
def graphs(monkeypatch) -> list[fx.GraphModule]:
    """The graphs of all segments, forward and backward, as a compiler gets them."""
    found: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, inputs: list) -> fx.GraphModule:
        found.append(graph)
        return graph

    compiler = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    monkeypatch.setattr(compilation, "inner_compiler", lambda config, defaults=None: compiler)
    return found


def train(layers: int = LAYERS, mask: Tensor | None = None, tokens: int = TOKENS, **options) -> None:
    torch._dynamo.reset()
    ids = torch.randint(VOCAB, (BATCH, tokens), generator=torch.Generator().manual_seed(0))
    step = torch.compile(
        model(layers, tokens),
        backend="tokenseek",
        options={"logits": "drop", "strict": True, "keep_ratio": 0.1, **options},
    )
    step(input_ids=ids, labels=ids, attention_mask=mask).loss.backward()


def shapes(graphs: list[fx.GraphModule]) -> Iterator[torch.Size]:
    """The shape of every tensor in the graphs and in the graphs that they call."""
    modules = [module for graph in graphs for module in graph.modules() if isinstance(module, fx.GraphModule)]
    for module in modules:
        for node in module.graph.nodes:
            value = node.meta.get("val")
            for x in value if isinstance(value, (tuple, list)) else [value]:
                if isinstance(x, torch.Tensor):
                    yield x.shape


def of_size(graphs: list[fx.GraphModule], size: int, rows: int) -> list[torch.Size]:
    """The tensors with a dim of this size and at least this many rows."""
    return [shape for shape in shapes(graphs) if size in shape and shape.numel() >= rows * size]


@pytest.mark.parametrize(("kv_grad", "report"), [("selected", "full"), slow("all", "kept")])
@pytest.mark.parametrize("scorer", ["tokenseek", "loss", "attention", "random"])
def test_no_logits_of_all_tokens_and_no_attention_weights(graphs, scorer, kv_grad, report):
    layers = {} if scorer == "random" else {"attention_layers": "all"}
    train(scorer=scorer, kv_grad=kv_grad, report_loss=report, select="sample", **layers)
    assert len(graphs) == 1 + 2 * (LAYERS + 2), "the seek stream; forward and backward of blocks, embedding and head"
    assert not of_size(graphs, VOCAB, BATCH * TOKENS)
    found = {*shapes(graphs)}
    assert any(TOKENS in shape for shape in found)
    # neither scores nor a mask, of all tokens or of the kept rows; live keys and values need the model's own mask
    pairs = [shape for shape in found if shape.count(TOKENS) > 1 or {52, TOKENS} <= {*shape}]
    assert all(shape.numel() <= BATCH * TOKENS * TOKENS for shape in pairs) if kv_grad == "all" else not pairs


def test_kept_logits_are_detected(graphs):
    """The comparison can fail."""
    train(scorer="random", logits="keep")
    assert of_size(graphs, VOCAB, BATCH * TOKENS)


def test_attention_alone_runs_neither_the_last_mlp_nor_the_head(graphs):
    train(layers=1, scorer="attention", report_loss="kept")
    assert not of_size(graphs, INNER, BATCH * TOKENS)
    assert not of_size(graphs, VOCAB, BATCH * 53)
    assert of_size(graphs, INNER, BATCH * 52), "the kept rows run through it"


def test_random_rows_run_no_head_in_full(graphs):
    train(scorer="random")
    assert not of_size(graphs, VOCAB, BATCH * 53)


@pytest.mark.slow
def test_attentions_share_one_mask():
    """Inductor writes what a mask that isn't positional adds to the scores of all tokens once, and its rows once."""
    mask = torch.rand(BATCH, 1, TOKENS, TOKENS, generator=torch.Generator().manual_seed(0)) < 0.9
    _, codes = run_and_get_code(train, layers=2, mask=mask, scorer="random")
    buffers = re.findall(r"empty_strided_cpu\(\((.+?)\), \(.+?\), torch\.(\w+)\)", "".join(codes))
    assert buffers.count((f"{BATCH}, 1, {TOKENS}, {TOKENS}", "float32")) == 1
    assert buffers.count((f"{BATCH}, 1, 52, {TOKENS}", "bool")) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scorer", "padded", "chunk_bytes"),
    [("tokenseek", False, None), ("tokenseek", True, None), ("loss", False, 2**20), ("attention", False, None)],
)
def test_nothing_of_a_long_sequence_is_wider_than_the_model(graphs, scorer, padded, chunk_bytes):
    """No mask, scores or logits of 8192 tokens in any shape: neither [k, T], nor [T, T], nor [T, V].

    Inside chunks, nothing of all tokens.
    """
    tokens, kept = 8192, 820
    mask = (torch.arange(tokens) < torch.tensor([[tokens], [5000]])).long() if padded else None
    train(tokens=tokens, mask=mask, scorer=scorer, chunk_bytes=chunk_bytes)
    widest = max(shape.numel() for shape in shapes(graphs))
    assert BATCH * tokens * 32 <= widest <= BATCH * tokens * INNER < min(BATCH * tokens * kept, tokens * VOCAB)
    if chunk_bytes:
        assert widest == BATCH * tokens * 32


def test_attention_received_works_in_blocks_of_queries():
    query, key = torch.randn(1, 8, 3000, 4), torch.randn(1, 2, 3000, 4)
    with Largest() as largest:
        attention_received._init_fn(query, key, None, 0.0, None, *Visibility(causal=True).flat())
    assert largest.bytes <= 4.2 * 2**20 < 8 * 3000 * 3000 * 4 / 50
