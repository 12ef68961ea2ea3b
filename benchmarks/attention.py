"""Compare selected attention with PyTorch's flash attention, in useful floating-point operations per second.

    python benchmarks/attention.py --out out/bench/attention            # on a CUDA device
    python benchmarks/attention.py --flex                               # also the forward by FlexAttention
    python benchmarks/attention.py --device cpu --flex                  # the cases for CPU; --quick: a smoke test

Useful operations per query and visible key: 4 E in forward (scores, values), 10 E in backward (scores, dP, dQ, dK, dV).
Selected attention has rows x all keys, but rows x rows for dK and dV. Operations that its kernels repeat don't count.
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
CLAIM = 0.6  # fraction of flash attention's speed per useful operation


@dataclass(frozen=True)
class Case:
    """Causal attention of `batch` sequences of `length` tokens, `kept` of which are rows."""

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
ON_CPU = [Case(4, 8, 2, 1024, 64), Case(1, 8, 2, 8192, 64)]  # as in the settings of cpu.py
QUICK = [Case(2, 4, 2, 128, 32)]


@dataclass
class Operands:
    """q, k, v of all tokens, [B, H, T, E] and [B, Hkv, T, E], and the sorted positions of the rows, int64 [B, k]."""

    query: Tensor
    key: Tensor
    value: Tensor
    positions: Tensor

    @classmethod
    def of(cls, case: Case, device: str) -> "Operands":
        """Random operands, in bfloat16 on CUDA, otherwise in float32."""
        generator = torch.Generator(device).manual_seed(0)
        kind = {"device": device, "generator": generator}
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        wide = [(case.batch, heads, case.length, case.width) for heads in (case.heads, case.kv_heads, case.kv_heads)]
        query, key, value = (torch.randn(shape, dtype=dtype, **kind) for shape in wide)
        order = torch.rand(case.batch, case.length, **kind).argsort(1)[:, : case.kept]
        return cls(query, key, value, order.sort(1).values)

    def rows(self, of: Tensor) -> Tensor:
        """The rows of a tensor, [B, H, k, E], that require grad."""
        at = self.positions[:, None, :, None].expand(-1, of.shape[1], -1, of.shape[3])
        return of.gather(2, at).requires_grad_()


def flash(operands: Operands) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Attention of all tokens by PyTorch's kernel: (forward, its inputs)."""
    inputs = [t.clone().requires_grad_() for t in (operands.query, operands.key, operands.value)]

    def forward() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)

    return forward, inputs


def selected(operands: Operands) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Selected attention of the rows: (forward, its inputs)."""
    inputs = [operands.rows(t) for t in (operands.query, operands.key, operands.value)]

    def forward() -> Tensor:
        return selected_attention(*inputs, operands.key, operands.value, operands.positions, causal=True)

    return forward, inputs


def flex(operands: Operands) -> tuple[Callable[[], Any], Callable[[], Tensor]]:
    """The rows by FlexAttention: (creation of its block mask, forward). No gradient: it has none on a CPU."""
    query, positions = operands.rows(operands.query).detach(), operands.positions
    make, attend = torch.compile(create_block_mask), torch.compile(flex_attention)

    def mask() -> Any:
        sizes = (len(positions), None, query.shape[2], operands.key.shape[2])
        return make(lambda b, h, q, kv: positions[b, q] >= kv, *sizes, device=query.device.type)

    known = mask()
    return mask, lambda: attend(query, operands.key, operands.value, block_mask=known, enable_gqa=True)


def useful(operands: Operands | None, case: Case) -> dict[str, float]:
    """Useful operations in forward and backward; without operands those of all tokens."""
    if operands is None:
        seen = live = case.batch * case.length * (case.length + 1) / 2
    else:
        seen = (operands.positions + 1).sum().item()
        live = case.batch * case.kept * (case.kept + 1) / 2
    unit = 2 * case.width * case.heads
    return {"forward": 2 * unit * seen, "backward": unit * (3 * seen + 2 * live)}


def timed(call: Callable[[], Any], device: str, count: int) -> float:
    """Seconds of a call, after two calls for warm-up.

    On CUDA the time of its kernels, without gaps between launches, which a compiled model doesn't have; otherwise the
    median of wall-clock times.
    """
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
    """Seconds of a call's CUDA kernels, the mean over ``count`` calls."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(count):
            call()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in found.key_averages()) / count / 1e6


def measure(name: str, case: Case, device: str, count: int) -> Result:
    """Operations per second in forward and backward, and on CUDA the peak bytes allocated beyond the operands."""
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
    """Seconds of FlexAttention's block mask and forward, and operations per second of the forward."""
    operands = Operands.of(case, device)
    seconds = {name: timed(call, device, count) for name, call in zip(("mask", "forward"), flex(operands), strict=True)}
    return {"seconds": seconds, "speed": {"forward": useful(operands, case)["forward"] / seconds["forward"]}}


def line(case: Case, both: dict[str, Result]) -> list[str]:
    """A row of the table: speeds in TFLOP/s, selected / flash, and whether the claim is met."""
    cells = []
    for key in ("forward", "backward", "both"):
        mine, theirs = both["selected"]["speed"][key], both["flash"]["speed"][key]
        cells.append(f"{mine / 1e12:.3g} / {theirs / 1e12:.3g} ({mine / theirs:.2f}x)")
    ratio = both["selected"]["speed"]["both"] / both["flash"]["speed"]["both"]
    times = [f"{1e3 * sum(both[name]['seconds'].values()):.3g}" for name in ("selected", "flash")]
    return [str(case), *cells, " / ".join(times), "met" if ratio >= CLAIM else "NOT MET", by_flex(both)]


def by_flex(both: dict[str, Result]) -> str:
    """FlexAttention's forward compared with selected attention, and its block mask; empty if it was not measured."""
    if "flex" not in both:
        return ""
    speed, seconds = both["flex"]["speed"]["forward"], both["flex"]["seconds"]
    share = speed / both["selected"]["speed"]["forward"]
    times = f"mask {1e3 * seconds['mask']:.3g} ms, forward {1e3 * seconds['forward']:.3g} ms"
    return f"{speed / 1e12:.3g} ({share:.2f}x), {times}"


def main(words: list[str]) -> int:
    """Measure all cases; print and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="smoke test: one small case")
    parser.add_argument("--flex", action="store_true", help="also measure the forward by FlexAttention")
    parser.add_argument("--count", type=int, default=20, help="timed calls, default 20")
    parser.add_argument("--out", type=Path, default=Path("out/bench/attention"))
    options = parser.parse_args(words)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("No CUDA device was found. Use `--device cpu --quick` to try the script without one.")
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
    """Write results.json and report.md, and print the last row of the table."""
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
