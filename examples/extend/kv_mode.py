"""Add a keys/values mode: `Config(kv="bf16")` keeps float32 keys and values in bfloat16 between forward and backward.

The forward reads them as they are, so the loss is exact; the backward reads them rounded, so `is_exact=False`.
"""

import contextlib
from collections.abc import Sequence

import torch
from torch import fx
from transformers import LlamaConfig, LlamaForCausalLM

import tokenseek_fx
from tokenseek_fx.passes import KVMode, register_kv_mode
from tokenseek_fx.passes.graph.emit import emit
from tokenseek_fx.passes.graph.kinds import Kind, tag
from tokenseek_fx.passes.graph.nodes import bytes_hint

CONVERT = torch.ops.prims.convert_element_type.default


def store(node: fx.Node) -> list[fx.Node]:
    """Add nodes to the forward graph; what is returned is saved in place of the key or value `node`."""
    stored = emit(node, CONVERT, node, torch.bfloat16)
    tag(stored, Kind.KEYS_VALUES)  # reports count it as such
    return [stored]


def restore(old: fx.Node, stored: Sequence[fx.Node]) -> fx.Node:
    """Add nodes to the backward graph that take the place of `old`."""
    return emit(stored[0], CONVERT, stored[0], old.meta["val"].dtype)


def kept_bytes(node: fx.Node) -> float:
    return bytes_hint(node) / node.meta["val"].element_size() * torch.bfloat16.itemsize


register_kv_mode(KVMode("bf16", kept_bytes=kept_bytes, store=store, restore=restore, is_exact=False))


def main() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False))
    ids, saved, gradients = torch.randint(64, (2, 24)), {}, {}
    for kv in ("keep", "bf16"):
        options = {"kv": kv, "keep_ratio": 0.25, "scorer": "strided", "inner": "aot_eager", "strict": True}
        with contextlib.redirect_stdout(None):
            report = tokenseek_fx.explain(model, input_ids=ids, labels=ids, options=options)
        saved[kv] = report.rewritten.by_kind()["keys/values"]
        loss = torch.compile(model, backend="tokenseek", options=options)(input_ids=ids, labels=ids).loss
        gradients[kv] = torch.cat([x.flatten() for x in torch.autograd.grad(loss, [*model.parameters()])])
    error = ((gradients["bf16"] - gradients["keep"]).norm() / gradients["keep"].norm()).item()
    assert saved["bf16"] == saved["keep"] / 2 and 0 < error < 0.01
    print(f"keys/values: {saved['bf16']} bytes instead of {saved['keep']}; error of the gradient {error:.1e}")


if __name__ == "__main__":
    main()
