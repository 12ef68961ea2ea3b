"""Writes in a forward: those that autograd sees are as in eager PyTorch, others carry no gradient or are refused."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import compare
import pytest
import torch
import torch.nn.functional as F
from compare import error, grads_of
from marks import needs_new_triton
from test_backend import D, Model, T, V, data
from torch import Tensor, nn

from tokenseek_fx import GraphNotSupported

# through AOTAutograd, as Inductor gets the graph
assert_matches = partial(compare.assert_matches, inner="aot_eager")
compiled = partial(compare.compiled, inner="aot_eager")


class Averaging(Model):
    """A running mean of a parameter, written under ``no_grad``, is the head."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(V, D, dtype=torch.float64))

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.lerp_(self.lm_head.weight, 0.5)
        return F.cross_entropy(F.linear(x, self.mean).flatten(0, 1), labels.flatten())


def test_what_is_written_under_no_grad_carries_no_gradient():
    model, eager = Averaging(), Averaging()
    run = compiled(model, data(), keep_ratio=1.0)
    eager(**data()).backward()
    assert "lm_head.weight" not in run.grads and eager.lm_head.weight.grad is None
    assert error(run.grads, grads_of(eager)) < 1e-12
    found = compiled(Averaging(), data(), keep_ratio=0.4)
    assert "lm_head.weight" not in found.grads


def under_no_grad(x: Tensor) -> None:
    with torch.no_grad():
        x.mul_(3.0)


def in_inference_mode(x: Tensor) -> None:
    with torch.inference_mode():
        x.mul_(3.0)


def by_setitem(x: Tensor) -> None:
    with torch.no_grad():
        x[:, 0] = 1.0


def by_detach(x: Tensor) -> None:
    x.detach().mul_(3.0)


def by_data(x: Tensor) -> None:
    x.data.masked_fill_(x.detach() > 1, 0.0)


def through_a_view(x: Tensor) -> None:
    x.detach()[:, 1:].zero_()


@pytest.mark.parametrize("write", [under_no_grad, in_inference_mode, by_setitem, by_detach, by_data, through_a_view])
def test_writes_that_autograd_does_not_see_are_refused(write):
    def head(model: Model, x: Tensor, labels: Tensor) -> Tensor:
        x = x * 1.0
        write(x)
        return model.loss(x, labels)

    with pytest.raises(Exception, match="where autograd does not see it") as caught:
        compiled(Model(head), data())
    cause = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(cause, GraphNotSupported) and "test_writes.py" in str(cause)


def seen(model: Model, x: Tensor, labels: Tensor) -> Tensor:
    """Written to with gradient, in parts, and where it carries none yet."""
    x = x * 1.0
    x.mul_(0.5)
    x[:, 0].add_(1.0)
    y = torch.zeros_like(x)
    y[..., ::2] = 1.0
    y[..., 2:] += x[..., 2:]
    mask = torch.ones(T, T, dtype=torch.bool)
    mask.tril_()
    with torch.no_grad():
        scale = torch.ones(D, dtype=x.dtype)
        scale.add_(y.abs().mean((0, 1)) * 0)
    return model.loss(y * scale, labels)


def test_writes_that_autograd_sees_are_as_in_eager():
    assert_matches(Model(seen), data(), 1e-9, keep_ratio=0.4)


def complex_values(model: Model, x: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        waves = torch.fft.fft(x, dim=-1)
    return model.loss(x * (1 + waves.real), labels)


def inference(model: Model, x: Tensor, labels: Tensor) -> Tensor:
    with torch.inference_mode():
        largest = x.abs().amax(-1, keepdim=True)
    return model.loss(x / (1 + largest.clone()), labels)


def test_complex_values_under_no_grad_carry_no_gradient():
    assert_matches(Model(complex_values), data(), 1e-9, keep_ratio=0.4)


def test_what_is_computed_in_inference_mode_carries_no_gradient():
    """Compared with ``no_grad``: eager PyTorch has no backward through values of inference mode."""
    plain = Model(lambda model, x, labels: model.loss(x / (1 + x.detach().abs().amax(-1, keepdim=True)), labels))
    found, expected = (compiled(each, data(), keep_ratio=0.4, scorer="strided") for each in (Model(inference), plain))
    assert error(found.grads, expected.grads) < 1e-12


class Sharing(Model):
    """Two attributes share memory, and one of them is written to."""

    def __init__(self, alike: bool) -> None:
        super().__init__()
        self.register_buffer("sums", torch.ones(2, D, dtype=torch.float64))
        self.last = self.sums[0] if alike else self.sums[0].clone()

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        self.last.add_(x.detach().mean((0, 1)))
        return super().loss(x - self.sums[0], labels)


def test_buffers_that_share_memory_are_refused_where_one_is_written_to():
    with pytest.raises(Exception, match="shares its memory"):
        compiled(Sharing(True), data())
    model = Sharing(False)
    before = copy.deepcopy(model.last)
    torch.compile(model, backend="tokenseek", options={"inner": "eager", "strict": True})(**data())
    assert not torch.equal(before, model.last)


class ByFrequency(Model):
    """The gradient of an embedding is divided by how often its id occurs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D, scale_grad_by_freq=True).double()


def test_frequencies_of_ids_are_those_of_all_tokens():
    batch = data()
    assert_matches(ByFrequency(), {**batch, "ids": batch["ids"] % 3}, 1e-9, keep_ratio=0.4)


LAUNCHING = """
import types
import torch, triton, triton.language as tl
import torch.utils._triton
from triton.backends.compiler import GPUTarget
from test_backend import Model, compile_eager, data

torch.utils._triton.has_triton = lambda: True
triton.runtime.driver.set_active(types.SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32)))

@triton.jit
def kernel(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(x + i))

def launched(x):
    out = torch.empty_like(x)
    kernel[(1,)](x, out, 64)
    return out

class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return launched(x)

    @staticmethod
    def backward(ctx, grad):
        return launched(grad)

for launch in (lambda x: launched(x.detach()), Function.apply):
    torch._dynamo.reset()
    try:
        compile_eager(Model(lambda model, x, y: model.loss(x + launch(x), y)), strict=True)(**data())
    except Exception as error:
        print("launches its own Triton kernel" in str(error))
"""


@needs_new_triton
def test_a_model_that_launches_a_triton_kernel_is_refused(tmp_path):
    """Outside and inside of a custom function; Dynamo is told that there is a GPU to compile for."""
    (tmp_path / "launching.py").write_text(LAUNCHING)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, tmp_path / "launching.py"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout.split() == ["True", "True"], done.stderr
