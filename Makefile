# Every target builds .venv first, once. Needs python3 (3.11 or newer), make and a C++ compiler.
PYTHON ?= python3
CORES  := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
BIN    := .venv/bin
STAMP  := .venv/.complete
LINK   := tokenseek_fx/passes

export TORCHINDUCTOR_COMPILE_THREADS ?= $(CORES)
export TOKENIZERS_PARALLELISM ?= false
export PYRIGHT_PYTHON_IGNORE_WARNINGS ?= 1

.PHONY: demo test check types docs bench bench-gpu clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py $(ARGS)

# one thread per worker: as many workers as cores, no fight over them; ALL=1 takes the slow tests as well
test: $(STAMP)
	OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/pytest -q -n $(CORES) --dist worksteal $(if $(ALL),,-m "not slow") $(ARGS)

check: $(STAMP) types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) $(LINK)
	$(BIN)/pyright

# the site, in site/; a link that leads nowhere is an error
docs: $(STAMP) $(LINK)
	$(BIN)/zensical build --clean --strict

bench: $(STAMP)
	$(BIN)/python benchmarks/cpu.py $(ARGS)

bench-gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py $(ARGS)

# pyright does not follow setuptools' package-dir mapping: show it the package where it imports from
$(LINK):
	ln -s ../passes $@

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs,hf,bench]'
	@touch $@

clean:
	rm -rf .venv build dist site *.egg-info $(LINK)
