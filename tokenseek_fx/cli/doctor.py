"""Doctor: which libraries, compiler and GPUs there are, and what works with them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from rich.markup import escape
from rich.table import Table
from torch import nn

from .. import __version__
from .answer import Answer

_LIBRARIES = {
    "triton": "kernels on a GPU",
    "transformers": "finetune, explain, estimate, bench",
    "peft": "--lora",
    "accelerate": "finetune",
    "bitsandbytes": "--qlora",
    "datasets": "datasets by name or directory",
    "pyarrow": "data in .parquet",
}
_MARKS = {"ok": "[green]ok[/]", "missing": "[yellow]missing[/]", "failed": "[red]failed[/]"}


@dataclass(frozen=True)
class Check:
    """``state``: "ok", "missing" (optional) or "failed". ``remedy``: what to do about it; empty if nothing."""

    name: str
    state: str
    found: str
    remedy: str = ""


def doctor(quick: bool) -> Answer:
    """Check the installation and, unless ``quick``, train a tiny model. Exit code 1 if a required check fails."""
    checks = [*_versions(), *_libraries(), _compiler(), *_gpus(), _backend(), *([] if quick else [_trains()])]
    failed = any(check.state == "failed" for check in checks)
    works = _works(checks)
    data = {"ok": not failed, "checks": [asdict(check) for check in checks], "works": works}
    return Answer(data, [_table(checks), *works], code=int(failed))


def _versions() -> Iterator[Check]:
    yield Check("tokenseek-fx", "ok", __version__)
    yield Check("Python", "ok", f"{platform.python_version()}, {platform.platform()}")
    yield Check("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")


def _libraries() -> Iterator[Check]:
    for name, purpose in _LIBRARIES.items():
        version = _version(name)
        remedy = "" if version else f"for {purpose}: pip install {name}"
        yield Check(name, "ok" if version else "missing", version or "not installed", remedy)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiler() -> Check:
    """Inductor generates C++ for the CPU."""
    names = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found:
        return Check("C++ compiler", "ok", found)
    state = "missing" if torch.cuda.is_available() else "failed"
    return Check("C++ compiler", state, "none", "for training on the CPU: install g++, or set CXX")


def _gpus() -> Iterator[Check]:
    if not torch.cuda.is_available():
        built = "torch is built without CUDA" if torch.version.cuda is None else "no CUDA device found"
        yield Check("GPU", "missing", built, "training runs on the CPU and is slow")
        return
    for i in range(torch.cuda.device_count()):
        it = torch.cuda.get_device_properties(i)
        bf16 = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
        yield Check(f"GPU {i}", "ok", f"{it.name}, {it.total_memory / 1e9:.0f} GB, sm_{it.major}{it.minor}, {bf16}")


def _backend() -> Check:
    if "tokenseek" in torch._dynamo.list_backends():
        return Check("backend", "ok", 'torch.compile(model, backend="tokenseek") is registered')
    return Check(
        "backend", "failed", "not registered", "install the package (pip install -e .): PYTHONPATH is not enough"
    )


class _Tiny(nn.Module):
    """A model with one attention layer and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)[:, None]
        mixed = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)[:, 0]
        return nn.functional.cross_entropy(self.head(mixed)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _trains() -> Check:
    """Run one training step of a tiny model through Inductor."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _Tiny().to(device)
    torch._dynamo.reset()
    try:
        compiled = torch.compile(model, backend="tokenseek", options={"strict": True, "keep_tokens": 4})
        compiled(torch.randint(32, (2, 16), device=device)).backward()
    except Exception as error:  # report whatever a compiler, driver or library raises
        first = next(iter(str(error).strip().splitlines()), "")
        return Check("training step", "failed", f"{type(error).__name__}: {first}"[:300], "see the lines above")
    return Check("training step", "ok", f"a tiny model was compiled and trained on the {device.upper()}")


def _works(checks: list[Check]) -> list[str]:
    """One line for each group of commands: whether it works here."""
    ok = {check.name for check in checks if check.state == "ok"}
    can = {
        "finetune, explain, estimate, bench": {"transformers", "accelerate"} <= ok,
        "--lora": {"transformers", "peft"} <= ok,
        "--qlora": {"transformers", "peft", "bitsandbytes"} <= ok,
    }
    return [f"{'works' if yes else 'does not work'}: {name}" for name, yes in can.items()]


def _table(checks: list[Check]) -> Table:
    out = Table(title="tokenseek doctor", title_justify="left")
    for name in ("", "", "found", "to do"):
        out.add_column(name, overflow="fold")
    for check in checks:
        out.add_row(_MARKS[check.state], *map(escape, (check.name, check.found, check.remedy)))
    return out
