"""Selected attention beside PyTorch's flash attention, in useful floating-point operations a second.

    python benchmarks/attention.py --out out/bench/attention            # on a CUDA device
    python benchmarks/attention.py --flex                               # and the forward by FlexAttention
    python benchmarks/attention.py --device cpu --flex                  # the CPU's own cases; --quick: does it run

Useful operations: 4 E for every query and key that it sees forward (scores, values), 10 E backward (scores again, dP, dQ, dK, dV).
Selected attention has rows x all keys for the first three, rows x rows for dK and dV; what its kernels compute twice is not counted.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import report
import suite
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.profiler import ProfilerActivity, profile

from tokenseek_fx.ops.attention import selected_attention

Result = dict[str, Any]
CLAIM = 0.6  # of flash attention's speed per useful operation


@dataclass(frozen=True)
class Case:
    """Causal attention of B sequences of T tokens, `kept` of which are rows."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    width: int
    keep_ratio: float = 0.1

    @property
    def kept(self) -> int:
        return max(1, round(self.keep_ratio * self.length))

    def __str__(self) -> str:
        return (
            f"B={self.batch} T={self.length} heads {self.heads}/{self.kv_heads} width {self.width} r={self.keep_ratio}"
        )


CASES = [
    Case(8, 32, 8, 4096, 64),
    Case(2, 32, 8, 16384, 64),
    Case(1, 32, 8, 65536, 64),
    Case(8, 32, 8, 4096, 128),
    Case(1, 32, 8, 32768, 128),
    Case(8, 32, 8, 4096, 64, keep_ratio=0.5),
]
ON_CPU = [Case(4, 8, 2, 1024, 64), Case(1, 8, 2, 8192, 64)]  # of the settings of cpu.py
QUICK = [Case(2, 4, 2, 128, 32)]


@dataclass
class Operands:
    """q, k, v of all tokens and the sorted positions of the rows."""

    query: Tensor
    key: Tensor
    value: Tensor
    positions: Tensor

    @classmethod
    def of(cls, case: Case, device: str) -> "Operands":
        """Random, in bf16 on CUDA."""
        generator = torch.Generator(device).manual_seed(0)
        kind = {"device": device, "generator": generator}
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        wide = [(case.batch, heads, case.length, case.width) for heads in (case.heads, case.kv_heads, case.kv_heads)]
        query, key, value = (torch.randn(shape, dtype=dtype, **kind) for shape in wide)
        order = torch.rand(case.batch, case.length, **kind).argsort(1)[:, : case.kept]
        return cls(query, key, value, order.sort(1).values)

    def rows(self, of: Tensor) -> Tensor:
        """[B, H, k, E], with gradient."""
        at = self.positions[:, None, :, None].expand(-1, of.shape[1], -1, of.shape[3])
        return of.gather(2, at).requires_grad_()


def flash(operands: Operands) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """All tokens, PyTorch's kernel."""
    inputs = [t.clone().requires_grad_() for t in (operands.query, operands.key, operands.value)]

    def forward() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)

    return forward, inputs


def selected(operands: Operands) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """The rows alone."""
    inputs = [operands.rows(t) for t in (operands.query, operands.key, operands.value)]

    def forward() -> Tensor:
        return selected_attention(*inputs, operands.key, operands.value, operands.positions, causal=True)

    return forward, inputs


def flex(operands: Operands) -> tuple[Callable[[], Any], Callable[[], Tensor]]:
    """The rows alone by FlexAttention, without gradient (it has none on a CPU): what makes its block mask, and the attention."""
    query, positions = operands.rows(operands.query).detach(), operands.positions
    make, attend = torch.compile(create_block_mask), torch.compile(flex_attention)

    def mask() -> Any:
        sizes = (len(positions), None, query.shape[2], operands.key.shape[2])
        return make(lambda b, h, q, kv: positions[b, q] >= kv, *sizes, device=query.device.type)

    known = mask()
    return mask, lambda: attend(query, operands.key, operands.value, block_mask=known, enable_gqa=True)


def useful(operands: Operands | None, case: Case) -> dict[str, float]:
    """Operations forward and backward; of all tokens where there are no operands."""
    if operands is None:
        seen = live = case.batch * case.length * (case.length + 1) / 2
    else:
        seen = (operands.positions + 1).sum().item()
        live = case.batch * case.kept * (case.kept + 1) / 2
    unit = 2 * case.width * case.heads
    return {"forward": 2 * unit * seen, "backward": unit * (3 * seen + 2 * live)}


def timed(call: Callable[[], Any], device: str, count: int) -> float:
    """Seconds of a call, after two that don't count: on CUDA those of its kernels, without the gaps between launches, which
    a compiled model does not have; else the median of the clock's."""
    call(), call()
    if device == "cuda":
        return kernel_seconds(call, count)
    seconds = []
    for _ in range(count):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def kernel_seconds(call: Callable[[], Any], count: int) -> float:
    """The mean over ``count`` calls."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(count):
            call()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in found.key_averages()) / count / 1e6


def measure(name: str, case: Case, device: str, count: int) -> Result:
    """Operations a second forward and backward, and on CUDA the bytes allocated above the operands."""
    operands = Operands.of(case, device)
    forward, inputs = {"flash": flash, "selected": selected}[name](operands)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
    out = forward()
    grad = torch.ones_like(out)
    seconds = {"forward": timed(forward, device, count)}
    seconds["backward"] = timed(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True), device, count)
    work = useful(operands if name == "selected" else None, case)
    speed = {key: work[key] / seconds[key] for key in seconds} | {"both": sum(work.values()) / sum(seconds.values())}
    peak = torch.cuda.max_memory_allocated() - base if device == "cuda" else None
    return {"seconds": seconds, "speed": speed, "peak": peak}


def measure_flex(case: Case, device: str, count: int) -> Result:
    """Seconds of its block mask and of the forward, and operations a second of that."""
    operands = Operands.of(case, device)
    seconds = {name: timed(call, device, count) for name, call in zip(("mask", "forward"), flex(operands), strict=True)}
    return {"seconds": seconds, "speed": {"forward": useful(operands, case)["forward"] / seconds["forward"]}}


def line(case: Case, both: dict[str, Result]) -> list[str]:
    """Speeds in TFLOP/s, selected / flash, and what is met."""
    cells = []
    for key in ("forward", "backward", "both"):
        mine, theirs = both["selected"]["speed"][key], both["flash"]["speed"][key]
        cells.append(f"{mine / 1e12:.3g} / {theirs / 1e12:.3g} ({mine / theirs:.2f}x)")
    ratio = both["selected"]["speed"]["both"] / both["flash"]["speed"]["both"]
    times = [f"{1e3 * sum(both[name]['seconds'].values()):.3g}" for name in ("selected", "flash")]
    return [str(case), *cells, " / ".join(times), "met" if ratio >= CLAIM else "NOT MET", by_flex(both)]


def by_flex(both: dict[str, Result]) -> str:
    """Its forward beside that of selected attention, and what its block mask takes; nothing where it was not asked for."""
    if "flex" not in both:
        return ""
    speed, seconds = both["flex"]["speed"]["forward"], both["flex"]["seconds"]
    share = speed / both["selected"]["speed"]["forward"]
    return f"{speed / 1e12:.3g} ({share:.2f}x), mask {1e3 * seconds['mask']:.3g} ms, forward {1e3 * seconds['forward']:.3g} ms"


def main(words: list[str]) -> int:
    """Measure, show, write after every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="does it run: one small case")
    parser.add_argument("--flex", action="store_true", help="the forward by FlexAttention as well")
    parser.add_argument("--count", type=int, default=20, help="timed calls, default 20")
    parser.add_argument("--out", type=Path, default=Path("out/bench/attention"))
    options = parser.parse_args(words)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("No CUDA device was found. `--device cpu --quick` tries the script without one.")
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    found: list[tuple[Case, dict[str, Result]]] = []
    for case in QUICK if options.quick else CASES if options.device == "cuda" else ON_CPU:
        both = {name: measure(name, case, options.device, options.count) for name in ("flash", "selected")}
        if options.flex:
            both["flex"] = measure_flex(case, options.device, options.count)
        found.append((case, both))
        write(found, options.out)
    return 0


def write(found: list[tuple[Case, dict[str, Result]]], out: Path) -> None:
    """Figures and their table."""
    head = [
        "case",
        *(f"{key} TFLOP/s, selected / flash" for key in ("forward", "backward", "both")),
        "ms",
        f">= {CLAIM}",
        "FlexAttention's forward TFLOP/s (/ selected)",
    ]
    table = report.table(head, [line(*one) for one in found])
    print(table.splitlines()[-1])
    where = suite.machine()
    results = [{"case": asdict(case), **both} for case, both in found]
    (out / "results.json").write_text(json.dumps({"machine": where, "results": results}, indent=1) + "\n")
    (out / "report.md").write_text(f"{table}\n\n`{json.dumps(where)}`\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
