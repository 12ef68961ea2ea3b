"""Resources of the Triton kernels, measured without a GPU.

``python -m tokenseek_fx.ops.static`` compiles every variant of every kernel for sm_80 and sm_90 and prints registers,
spills and shared memory as a table. Its exit status is 1 if a variant does not fit. Each file of kernels lists its
variants in a function ``variants()``.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

#: The modules with kernels.
MODULES = ("received_triton", "head_triton", "attention_triton")
#: The type of a floating-point argument in a call from Inductor (in plain Triton: fp32); kernels cast it to float32.
NUMBER = "fp64"
#: Shared memory limit of one block in bytes, by compute capability (CUDA C++ programming guide).
SHARED = {80: 163 * 1024, 90: 227 * 1024}


@dataclass(frozen=True)
class Variant:
    """One kernel with the arguments that it is compiled for.

    ``label``: a description for the table. ``kernel``: a function decorated by ``triton.jit``. ``signature``: name ->
    type of each argument that is not constant (``"*bf16"``, ``"i32"``). ``constexprs``: name -> value of each constant;
    ``None`` for an omitted argument. ``aligned``: arguments that are multiples of 16, as strides are if heads and
    widths are (pointers always are); Triton specialises the code for them. ``spills``: bytes of local memory that a
    thread may use, where larger blocks were measured to be faster in spite of them.
    """

    label: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    aligned: tuple[str, ...] = ()
    spills: int = 0


@dataclass(frozen=True)
class Usage:
    """Resources of a variant on one target.

    ``registers`` per thread, ``spills``: bytes of local memory per thread, ``shared``: bytes of shared memory per
    block.
    """

    variant: Variant
    capability: int
    registers: int
    spills: int
    shared: int

    @property
    def fits(self) -> bool:
        """True if spills and shared memory stay within their limits."""
        return self.spills <= self.variant.spills and self.shared <= SHARED[self.capability]


def variants() -> list[Variant]:
    """The variants of all modules with kernels."""
    modules = [importlib.import_module(f"tokenseek_fx.ops.{name}") for name in MODULES]
    return [variant for module in modules for variant in module.variants()]


def usage(variant: Variant, capability: int) -> Usage:
    """Compile ``variant`` for a GPU of this compute capability (80: sm_80); no GPU is needed.

    Needs triton, whose wheel contains ``ptxas`` and ``cuobjdump``, and a process without ``TRITON_INTERPRET``.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {**variant.signature, **dict.fromkeys(variant.constexprs, "constexpr")}
    ordered = {name: signature[name] for name in variant.kernel.arg_names}
    aligned = [i for i, (name, type) in enumerate(ordered.items()) if type[0] == "*" or name in variant.aligned]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(variant.kernel, ordered, dict(variant.constexprs), attributes)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    taken = _resources(triton.knobs.nvidia.cuobjdump.path, compiled.asm["cubin"])
    return Usage(variant, capability, taken["REG"], taken["STACK"] + taken["LOCAL"], compiled.metadata.shared)


def _resources(cuobjdump: str, cubin: bytes) -> dict[str, int]:
    """Resource names and values that ``cuobjdump`` reports for the single kernel of a compiled module."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", told.partition("Function")[2])}


def report() -> Iterator[Usage]:
    """The usage of every variant on every target."""
    return (usage(variant, capability) for variant in variants() for capability in SHARED)


def markdown(found: Usage) -> str:
    """One row of the table."""
    variant = found.variant
    cells = [variant.kernel.__name__, variant.label, f"{variant.num_warps} / {variant.num_stages}"]
    cells += [f"sm_{found.capability}", found.registers, found.spills, f"{found.shared / 1024:.1f}"]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> int:
    """Print the table; return 1 if a variant exceeds its limit of spills or shared memory."""
    print("| kernel | variant | warps / stages | target | registers | spilled bytes | shared KiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    bad = 0
    for found in report():
        print(markdown(found), flush=True)
        bad += not found.fits
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
