"""The static report of the kernels, and a machine without triton."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from marks import needs_new_triton

from tokenseek_fx.ops.static import SHARED

SPILLED = {"loss_kernel": 128, "gradient_kernel": 128}
#: Registers per thread, so that the 65536 of a multiprocessor suffice for two blocks of 8 warps; other kernels' tiles
#: fill a multiprocessor.
REGISTERS = {"lse_kernel": 128, "received_kernel": 128}
KERNELS = {*REGISTERS, *SPILLED, "forward_kernel", "grad_query_kernel", "grad_keys_kernel"}


def python(*arguments: str) -> subprocess.CompletedProcess:
    """Another Python process, which does not interpret kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
@needs_new_triton
def test_every_kernel_fits():
    """Those of the head spill a few registers: their blocks are larger than would spill none (docs/design/0013)."""
    done = python("-m", "tokenseek_fx.ops.static")
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    assert rows, done.stderr
    for kernel, variant, _, target, registers, spills, shared in rows:
        limit, spilled = SHARED[int(target.removeprefix("sm_"))] / 1024, SPILLED.get(kernel, 0)
        fits = (int(spills) <= spilled, float(shared) <= limit, 0 < int(registers) <= REGISTERS.get(kernel, 255))
        assert fits == (True, True, True), (kernel, variant, target)
    assert done.returncode == 0
    assert {row[0] for row in rows} == KERNELS


SPILLING = """
import triton, triton.language as tl
from tokenseek_fx.ops import static

@triton.jit
def kernel(x, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a = tl.load(x + i)
    tl.store(x + i, a * tl.sum(a))

found = static.usage(static.Variant("", kernel, {"x": "*fp32"}, {"SIZE": 16384}, num_warps=1), 80)
print(found.spills > 0, found.fits)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="the report needs triton")
def test_spills_are_detected(tmp_path):
    """The bound can fail."""
    (tmp_path / "spilling.py").write_text(SPILLING)
    done = python(str(tmp_path / "spilling.py"))
    assert done.stdout.split() == ["True", "False"], done.stderr


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch, tokenseek_fx

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.head = torch.nn.Embedding(9, 8), torch.nn.Linear(8, 24), torch.nn.Linear(8, 9)

    def forward(self, ids):
        x = self.embed(ids)
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        x = x + torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]
        return torch.nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())

options = {"scorer": "tokenseek", "inner": "aot_eager", "strict": True}
torch.compile(Model(), backend="tokenseek", options=options)(torch.arange(8).view(2, 4)).backward()
print("trained", sys.modules["triton"])
"""


def test_a_model_trains_without_triton():
    done = python("-c", WITHOUT_TRITON)
    assert done.stdout.split() == ["trained", "None"], done.stderr
