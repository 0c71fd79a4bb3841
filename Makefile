# The same verbs on a laptop and in CI. `make VENV=/elsewhere ...` uses another environment,
# `make PYTHON=/path/to/python3.12 ...` another interpreter, `make demo ARGS="--set seed=1"` passes arguments on.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.prw-installed

.PHONY: help setup lint type test docs bench demo clean
.DEFAULT_GOAL := help

help:
	@echo "make setup   environment in $(VENV), pinned by constraints.txt"
	@echo "make demo    trains the five stages on the embedded model and writes a report"
	@echo "make test    the tests (ARGS=... goes to pytest)"
	@echo "make lint    ruff and the import layers"
	@echo "make type    mypy --strict on the three packages"
	@echo "make docs    the documentation, strictly, into docs/site"
	@echo "make bench   every benchmark, quickly"
	@echo "make clean   removes what the verbs above wrote (not runs/)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(0 if sys.version_info >= (3, 11) else "prw needs Python 3.11 or newer and $(PYTHON) is " + v + ": run `make PYTHON=/path/to/python3.11 ...`.")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	PYTHONPATH=.:kernels $(BIN)/lint-imports

type: $(STAMP)
	$(BIN)/mypy

test: $(STAMP)
	$(BIN)/pytest -n $(JOBS) --dist loadfile $(ARGS)

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet -f docs/mkdocs.yml

bench: $(STAMP)
	@set -e; names="$$(find benchmarks -maxdepth 1 -name '[a-z]*.py' | sort)"; \
	if [ -z "$$names" ]; then echo "benchmarks/ holds no benchmark in this version."; fi; \
	for file in $$names; do $(BIN)/python -m "benchmarks.$$(basename $$file .py)" --quick $(ARGS); done

demo: $(STAMP)
	$(BIN)/prw-flux demo $(ARGS)

clean:
	rm -rf $(VENV) build dist docs/site *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
