# make train   set up .venv, then train the demo on two CPU ranks
# make test    set up .venv, then every check: format, lint, types, tests
# make slurm-test   launch, preempt, requeue and cancel on a two-node Slurm on this machine; needs root (docs/cluster.md)
# make setup   only set up .venv; done again when pyproject.toml changes
# make chaos   20 faults at random moments; SEED=n says which
# Choose another Python with PYTHON=..., another torch with TORCH="torch==...", more workers for the tests with WORKERS=n.

SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
TORCH ?= torch==2.13.0
WORKERS ?= 2
# Debian keeps the venv module in a package of its own; root can install it.
VENV_PACKAGE = test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq python3-venv
BIN := .venv/bin
STAMP := .venv/set-up

.PHONY: train test slurm-test setup chaos clean

train: $(STAMP)
	$(BIN)/moetrain train experiment=demo $(ARGS)

test: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

slurm-test: $(STAMP)
	scripts/slurm_test.sh $(BIN)/python

chaos: $(STAMP)
	$(BIN)/python scripts/chaos.py $(if $(SEED),--seed $(SEED)) $(ARGS)

setup: $(STAMP)

# torch comes first and alone, so that the version asked for is the one that everything else is installed beside.
$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer found; install one, or give PYTHON=path"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || { rm -rf .venv; $(VENV_PACKAGE) && $(PYTHON) -m venv .venv; } || { \
	  rm -rf .venv; echo "make: $(PYTHON) cannot make a virtual environment; on Debian: apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
