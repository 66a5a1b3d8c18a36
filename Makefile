# Every goal sets up .venv first, so a fresh clone needs one command: make demo, or make test.
PYTHON ?= python3
VENV := .venv
VENV_DOCS := .venv-docs
BIN := $(VENV)/bin
# Lives in .venv, so that removing .venv is a complete reset.
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test quick lint docs

help:
	@echo "make demo    train, search, build and check a small CNN (examples/quickstart.py)"
	@echo "make test    all tests            make quick   a case of each that is fast"
	@echo "make lint    ruff and mypy        make setup   only create .venv"
	@echo "make docs    the site, in build/site; it needs neither .venv nor PyTorch"

demo: $(STAMP)
	$(BIN)/python examples/quickstart.py

# Workers import this package again and again, which takes seconds each where no compiled files may be written.
unexport PYTHONDONTWRITEBYTECODE

# One thread each: the networks of the tests are too small to gain from more, and sums come out the same on any machine.
# A process for each core; the tests of a file share fixtures, and so a process.
test quick: export OMP_NUM_THREADS ?= 1
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist loadscope
test: $(STAMP)
	$(PYTEST)

quick: $(STAMP)
	$(PYTEST) --one-case --assert=plain -o addopts="--strict-markers" -m "not slow and not ray" tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing autoprune and its dependencies into $(VENV)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# pip and not python, because it comes last: an interrupted creation is repeated.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "autoprune needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
	    "name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The reference is read from the sources, not imported, so the site has a small environment of its own.
docs: $(VENV_DOCS)/.installed
	$(VENV_DOCS)/bin/python docs/stage.py
	$(VENV_DOCS)/bin/zensical build --clean --strict

DOCS := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])
$(VENV_DOCS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV_DOCS)
	$(VENV_DOCS)/bin/python -m pip install --quiet --constraint constraints.txt $$($(PYTHON) -c '$(DOCS)')
	@touch $@
