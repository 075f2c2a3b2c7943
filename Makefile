# Everything runs from a fresh clone with Python and git: each target builds its own .venv on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS := test,check,evaluate,report
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: demo test slow fuzz check coverage table docs dist clean

demo: $(VENV)/ready
	$(BIN)/peft-lorasuite demo

# The default tests.
test: $(VENV)/ready
	$(PYTEST) -m "not slow"

# The tests marked slow alone.
slow: $(VENV)/ready
	$(PYTEST) -m slow

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
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet torch==2.13.0 \
		|| $(BIN)/python -m pip install --quiet torch
	$(BIN)/python -m pip install --quiet -e ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info
