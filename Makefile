# Everything runs from a fresh clone with Python and git: each target builds its own .venv on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PART ?= 1
EXTRAS := test,check,evaluate,report
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2 --dist loadfile --durations=15

# The lowest versions that setup.cfg allows. PyPI's torch 2.8 brings gigabytes of CUDA libraries: LOWEST_TORCH names
# another version, and PIP_EXTRA_INDEX_URL an index with CPU builds.
LOWEST_PYTHON ?= $(or $(shell command -v python3.10),$(PYTHON))
LOWEST_VENV ?= .venv-lowest
LOWEST_TORCH ?= 2.8.0
LOWEST_TESTS ?= tests
QUICK := tests/compat tests/arch/test_config_values.py tests/models/test_prefix_cache.py \
	tests/models/test_generation.py tests/training tests/adapters/test_peft_types.py

.PHONY: demo test slow fuzz lowest lowest-quick check coverage table docs dist clean

demo: $(VENV)/ready
	$(BIN)/peft-lorasuite demo

# The default tests.
test: $(VENV)/ready
	$(PYTEST) -m "not slow"

# The tests marked slow alone; `make slow PART=8` runs one case of eight.
slow: $(VENV)/ready
	$(PYTEST) -m slow --part $(PART)

# The default tests with the lowest versions of all libraries.
lowest: $(LOWEST_VENV)/ready
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
		$(LOWEST_VENV)/bin/python -m pytest -n 2 --dist loadfile -m "not slow" $(LOWEST_TESTS)

# The same for maps, models, training, adapters and the Hub alone, with the torch that `make test` installs.
lowest-quick:
	$(MAKE) lowest LOWEST_PYTHON=$(PYTHON) LOWEST_TORCH=2.13.0 LOWEST_TESTS="$(QUICK)"

# Thousands of mutated inputs; the default tests run 300 of them.
fuzz: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/run.py --cases 5000

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

coverage: $(VENV)/ready
	$(PYTEST) --cov=peft_lorasuite --cov-report=term:skip-covered

table: $(VENV)/ready
	$(BIN)/python -m pytest tests/upgrading/test_table.py --all-pairs -q

docs: $(VENV)/ready
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	$(BIN)/mkdocs build --strict

dist: $(VENV)/ready
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# The CPU build of torch comes first where none is there: a plain "torch" would pull gigabytes of CUDA libraries.
# Nothing is pinned for users: setup.cfg has lower bounds only.
$(VENV)/ready: setup.cfg pyproject.toml
	@echo "installing the package and what its tests, checks and reports need into $(VENV), in a few minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet torch==2.13.0 \
		|| $(BIN)/python -m pip install --quiet torch
	$(BIN)/python -m pip install --quiet -e ".[$(EXTRAS)]"
	touch $@

$(LOWEST_VENV)/ready: setup.cfg tests/lowest.txt
	test -x $(LOWEST_VENV)/bin/python || $(LOWEST_PYTHON) -m venv $(LOWEST_VENV)
	$(LOWEST_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(LOWEST_VENV)/bin/python -m pip install --quiet torch==$(LOWEST_TORCH)
	$(LOWEST_VENV)/bin/python -m pip install --quiet -c tests/lowest.txt -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST_VENV) build dist site *.egg-info
