# Everything a person or CI runs. `make demo` and `make test` work on a bare machine with Python 3.11 or later and make.

PYTHON ?= $(firstword $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p; done) python3)
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
WORKERS ?= 2

# Several test processes share the cores: one thread each, and no lookups on the hub.
QUIET := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
PYTEST := $(QUIET) $(BIN)/python -m pytest

.PHONY: install demo test test-slow parity check fix bench clean
.DELETE_ON_ERROR:

install: $(INSTALLED)

# torch first and alone: see constraints.txt
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,hf]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/sightline ask docs/assets/shapes.png "Where is the red circle?" --draw demo.png
	@echo "drawn: demo.png"

test: $(INSTALLED)
	$(PYTEST) -n $(WORKERS) --dist loadfile -m "not slow and not kill"

test-slow: $(INSTALLED)
	$(PYTEST) --timeout 3600 -m "slow or kill"

parity: $(INSTALLED)
	$(PYTEST) -m parity

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	set -e; for script in benchmarks/bench_*.py; do $(BIN)/python $$script; done

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
