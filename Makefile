# Everything a person or CI runs. `make demo` and `make test` work on a bare machine with Python 3.11 or later and make.

PYTHON ?= $(firstword $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p; done) python3)
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PACKAGE := $(VENV)/package-installed
INSTALLED := $(VENV)/installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
WORKERS ?= 2

# Several test processes share the cores: one thread each, and no lookups on the hub.
QUIET := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
PYTEST := $(QUIET) $(BIN)/python -m pytest

# What T1 to T15 of docs/training.md hold, the long forms too
CRASH := kill checkpoints resuming stopping workers shortages budget bad_samples trainer distributed

.PHONY: install demo test test-slow crash parity check fix catalogue bench clean
.DELETE_ON_ERROR:

install: $(INSTALLED)

# torch first and alone: see constraints.txt; an environment that was left half made is made again
$(PACKAGE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: found no Python of 3.11 or later, expected python3.11 or newer on the path" >&2; exit 2; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) $(TORCH)
	$(PIP) -c constraints.txt -e .
	touch $@

$(INSTALLED): $(PACKAGE)
	$(PIP) -c constraints.txt -e '.[dev,hf]'
	touch $@

demo: $(PACKAGE)
	$(BIN)/sightline ask docs/assets/shapes.png "Where is the red circle?" --draw demo.png
	@echo "drawn: demo.png"

test: $(INSTALLED)
	$(PYTEST) -n $(WORKERS) --dist loadfile -m "not slow and not kill"

test-slow: $(INSTALLED)
	$(PYTEST) --timeout 3600 -m "slow or kill"

crash: $(INSTALLED)
	$(PYTEST) --timeout 3600 $(CRASH:%=tests/training/test_%.py)
	$(QUIET) $(BIN)/python benchmarks/kills.py

parity: $(INSTALLED)
	$(PYTEST) -m parity

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# the list of models as a file, after a row was added or changed
catalogue: $(INSTALLED)
	$(BIN)/python -m sightline.zoo.catalogue

bench: $(INSTALLED)
	set -e; for script in benchmarks/bench_*.py benchmarks/eval_scenes.py; do $(BIN)/python $$script; done

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
