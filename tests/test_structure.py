"""The structure of passes/: folders in order that import downward only, one assembly of passes, short files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest
from programs import planned

from tokenseek_fx.passes import attention_rule, axes_rule, elementwise, register_kv_mode, rows_rule, signal, training
from tokenseek_fx.passes.graph.registry import aten_overloads
from tokenseek_fx.passes.keep.kv_modes import KVMode

ROOT = Path(__file__).parents[1]
#: The folders of passes/, in order of processing: each imports from itself and from those before it.
ROOMS = ["graph", "capture", "rules", "analysis", "attention", "keep", "rows", "streams", "lower", "memory"]
FILES = sorted((ROOT / "passes").rglob("*.py"))
LIMIT = 350


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(file: Path) -> Iterator[str]:
    """The modules of passes/ that a file imports, under ``TYPE_CHECKING`` too."""
    known = {module_of(other) for other in FILES}
    package = module_of(file) if file.name == "__init__.py" else module_of(file).rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            module = ".".join([*base, *filter(None, [node.module])])
            names = {module, *(f"{module}.{alias.name}" for alias in node.names)}
            yield from (names & known) - {module_of(file)}


def room_of(module: str) -> int:
    """The number of a module's folder; files at the top of passes/ come last."""
    parts = module.split(".")
    return ROOMS.index(parts[1]) if len(parts) > 1 and parts[1] in ROOMS else len(ROOMS)


def test_every_folder_is_in_the_order():
    assert {file.parent.name for file in FILES if file.parent.name != "passes"} == {*ROOMS}


@pytest.mark.parametrize("file", FILES, ids=lambda file: module_of(file))
def test_a_folder_imports_from_those_before_it(file):
    upward = [other for other in imported(file) if room_of(other) > room_of(module_of(file))]
    assert not upward


def test_no_circular_imports():
    graph = nx.DiGraph((module_of(file), other) for file in FILES for other in imported(file))
    assert [c for c in nx.strongly_connected_components(graph) if len(c) > 1] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: module_of(file))
def test_files_are_short(file):
    assert len(file.read_text().splitlines()) <= LIMIT


def test_passes_are_assembled_on_one_page():
    """Only ``pipeline.py`` makes a pipeline or names several passes; others add one or stop early."""
    found = {}
    for file in [*FILES, *(ROOT / "tokenseek_fx").rglob("*.py")]:
        if "tokenseek_fx/passes/" in str(file) or file.name == "__init__.py":
            continue
        made = re.findall(r"\bPipeline\(", file.read_text())
        passes = {step.__class__.__name__ for step in training(planned()).passes}
        called = {
            name
            for name in passes
            if re.search(rf"\b{name}\(", file.read_text()) and f"class {name}" not in file.read_text()
        }
        if made or len(called) > 2:
            found[file.name] = (len(made), called)
    assert [*found] == ["pipeline.py"]


def test_importing_the_passes_needs_no_backend():
    """From the package above, passes/ imports only operators, version differences and the category of warnings."""
    allowed = {"ops", "compat", "warnings"}
    for file in FILES:
        depth = len(file.relative_to(ROOT).parts) - 1
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level > depth:
                assert (node.module or "").split(".")[0] in allowed, (file, node.module)


def test_importing_the_package_loads_neither_torch_nor_itself():
    """Its names are imported where they are first used, so the import costs next to nothing beside that of torch."""
    code = "import sys, tokenseek_fx; print(sorted(m for m in sys.modules if m.startswith(('torch', 'tokenseek_fx'))))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "['tokenseek_fx']"


# -- registries -------------------------------------------------------------------------------------------------------


def test_a_rule_is_registered_once():
    for register in (
        lambda: axes_rule("aten::_grouped_mm", rule=elementwise),
        lambda: rows_rule(*aten_overloads("expand.default"))(lambda call: None),
        lambda: attention_rule(*aten_overloads("scaled_dot_product_attention.default"))(lambda given: None),
        lambda: signal("attention")(lambda prefill: None),
        lambda: register_kv_mode(KVMode("fp8")),
    ):
        with pytest.raises(ValueError, match="is already registered"):
            register()


def test_a_rule_for_an_operation_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match=r"ATen has no operation 'sofmax\.int'"):
        aten_overloads("softmax.int sofmax.int")
    with pytest.raises(ValueError, match="name at least one target"):
        axes_rule(rule=elementwise)
