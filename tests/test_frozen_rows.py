"""Values without gradient that rows need are recomputed on the rows; the seek stream keeps only their inputs."""

from __future__ import annotations

import torch
import zoo
from compare import assert_matches
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import rewritten
from test_pipeline import captured
from test_random import RATIOS, RELAXED, Transformer, batches, configurations
from torch import nn

from tokenseek_fx.passes.keep.frozen_rows import FindFrozenRows, FrozenRows
from tokenseek_fx.passes.streams.trace import Rewrite


@settings(max_examples=30, **RELAXED)
@given(configurations(), batches(), RATIOS, st.integers(0, 1000), st.sampled_from([0.3, 0.7, 0.9]))
def test_models_with_frozen_parameters_equal_the_reference(configuration, batch, ratio, seed, share):
    model = Transformer(configuration)
    parameters, generator = [*model.parameters()], torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.requires_grad_(bool(torch.rand((), generator=generator) > share))
    parameters[-1].requires_grad_()
    assert_matches(model, batch, 1e-9, keep_ratio=ratio)


def tuned() -> tuple[nn.Module, dict]:
    model = zoo.build("llama")
    return zoo.lora(model), zoo.batch(model, 2, 13)


def test_only_the_residual_stream_of_the_first_block_is_kept_under_lora():
    """Its norm and the outputs of the frozen linears are recomputed on its rows: only the seek stream reads them."""
    program = captured(*tuned())
    made = FindFrozenRows().run(program)[FrozenRows].nodes
    assert sum(node.target is torch.ops.aten.linear.default for node in made) == 3
    rewrite = rewritten(program, keep_ratio=0.3)[Rewrite]
    seek = {*rewrite.seek.values()}
    assert all({*rewrite.seek[node].users} <= seek for node in made if node in rewrite.seek)


def test_under_autocast_rows_are_taken_from_the_seek_stream():
    """The operations are in autocast regions, and rows are computed before these."""

    class Autocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.batch = tuned()

        def forward(self, **batch):
            with torch.autocast("cpu", torch.bfloat16):
                return self.model(**batch)

    model = Autocast()
    assert not FindFrozenRows().run(captured(model, model.batch))[FrozenRows].nodes
