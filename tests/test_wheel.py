"""The wheel: it holds all that a model needs to be compiled, and needs only its base dependencies."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
# without the packages of other extras, as in an environment that has none
USE = """
import sys
sys.modules |= dict.fromkeys(sys.argv[2].split(","))
sys.path[:0] = [sys.argv[1]]

import tokenseek_fx
import torch
from golden_model import TOKENS, VOCAB, Model

assert tokenseek_fx.__file__.startswith(sys.argv[1]), tokenseek_fx.__file__
ids = torch.randint(VOCAB, (2, TOKENS))
model = Model()
expected = model(ids, ids)[0]
with tokenseek_fx.record() as rec:
    loss = torch.compile(model, backend="tokenseek", options={"keep_ratio": 0.6, "inner": "aot_eager"})(ids, ids)[0]
torch.testing.assert_close(loss, expected)
loss.backward()
assert rec[0].indices.shape == (2, 3) and model.embed.weight.grad is not None
print(tokenseek_fx.explain(model, ids, ids, options={"keep_ratio": 0.6}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Unpacked. It is built from a copy: building writes beside the sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("tokenseek_fx", "passes"):
        shutil.copytree(ROOT / name, source / name, ignore=lambda at, names: {"passes", "__pycache__"} & {*names})
    subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=source, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    zipfile.ZipFile(built).extractall(out / "there")
    return out / "there"


def test_it_compiles_a_model_with_the_base_dependencies(wheel, tmp_path):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    others = {re.split(r"[\[;><= ]", each)[0].replace("-", "_") for listed in extras.values() for each in listed}
    shutil.copy(ROOT / "tests/golden_model.py", tmp_path)
    command = [sys.executable, "-c", USE, str(wheel), ",".join(others)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "keeps 3 of 5 tokens" in done.stdout


def test_it_holds_every_file_of_the_package(wheel):
    packages = [(ROOT / "tokenseek_fx", "tokenseek_fx"), (ROOT / "passes", "tokenseek_fx/passes")]
    files = {
        f"{at}/{file.relative_to(folder)}"
        for folder, at in packages
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert files <= {str(file.relative_to(wheel)) for file in wheel.rglob("*")}
