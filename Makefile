# Everything stays inside this folder: .venv, caches, runs. Nothing needs root but the Slurm cluster.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VENV_TORCHTITAN := .venv-torchtitan
TRAINERS := $(VENV)/.integrations-ready $(VENV_TORCHTITAN)/.ready
export PIP_NO_CACHE_DIR := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Otherwise each of the many processes that the tests start would compile the package again.
export PYTHONDONTWRITEBYTECODE :=
export MPLCONFIGDIR := $(CURDIR)/.cache/matplotlib
export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/.cache/torchinductor

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full test-fast integrations integrations-full check surface format bench \
  reference docs coverage chaos chaos-local slurm-up slurm-down clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-17s %s\n", $$1, $$2}'

setup: $(VENV)/.ready ## make .venv with everything in it

$(VENV)/.ready: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "python3 cannot make a virtual environment. On Debian: apt install python3-venv" >&2; exit 2; }
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup ## train on this machine's own text and write a report
	$(BIN)/mixtera-hpc demo

# Files with long tests come first, so that all processes end at about the same time, and one process runs the files
# that wait for jobs; see tests/conftest.py. Three processes keep two cores busy.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder
TESTS := tests/slurm tests/mpi tests/e2e tests/property tests/integrations tests/unit

test: setup ## run every test that the marker `full` does not leave out
	$(PYTEST) $(TESTS)

test-full: setup ## run all tests, also further inputs of a mechanism that another test shows
	$(PYTEST) -m "not integrations" $(TESTS)

test-fast: setup ## run the unit tests that take no more than some seconds, on two processes
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not full" tests/unit

chaos-local: setup ## damage a run 30 times on this machine, and prove that nothing is lost or doubled; some 15 minutes
	$(BIN)/python tests/chaos/chaos_local.py --rounds 30 --seed 0

integrations: $(TRAINERS) ## launch the example of every trainer, two ranks under torchrun; some minutes
	$(PYTEST) -q -m "integrations and not full" tests/integrations

integrations-full: $(TRAINERS) ## the same under every launcher
	$(PYTEST) -q -m integrations tests/integrations

$(VENV)/.integrations-ready: $(VENV)/.ready
	$(BIN)/pip install --quiet -c constraints.txt -e '.[integrations]'
	@touch $@

# torchtitan needs other versions of fsspec and huggingface_hub than .venv has. This environment sees .venv's packages,
# and its own ones come first.
$(VENV_TORCHTITAN)/.ready: $(VENV)/.integrations-ready constraints-torchtitan.txt
	$(BIN)/python -m venv --clear --without-pip $(VENV_TORCHTITAN)
	@base=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  own=$$($(VENV_TORCHTITAN)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  echo "import site; site.addsitedir('$$base')" > "$$own/base.pth"
	$(VENV_TORCHTITAN)/bin/python -m pip install --quiet -c constraints-torchtitan.txt -e '.[torchtitan]'
	@# mpi4py looks for the MPI library below its own Python. mpiexec looks for its other programs where it was called.
	ln -sfn $(CURDIR)/$(VENV)/lib/*mpi* $(VENV_TORCHTITAN)/lib/
	printf '#!/bin/sh\nexec "%s" "$$@"\n' "$(CURDIR)/$(BIN)/mpiexec" > $(VENV_TORCHTITAN)/bin/mpiexec
	chmod +x $(VENV_TORCHTITAN)/bin/mpiexec
	@touch $@

check: setup ## lint, format, types, imports and layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_layers.py tests/unit/test_layout.py

surface: setup ## print figures of how the code reads, next to their targets
	$(BIN)/python -m bench.surface

coverage: setup ## run the unit and property tests and print which lines they reach
	$(BIN)/python -m pytest -q --cov --cov-report=term:skip-covered tests/unit tests/property

reference: setup ## write docs/config.md and docs/cli.md from the code
	$(BIN)/python -m mixtera_hpc.config.reference > docs/config.md
	$(BIN)/python -m mixtera_hpc.cli.reference > docs/cli.md

docs: $(VENV)/.docs-ready ## build the documentation site in build/site
	$(BIN)/mkdocs build --strict

$(VENV)/.docs-ready: $(VENV)/.ready
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	@touch $@

format: setup ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## measure, next to peers and physical limits; tables and JSON in bench/out
	$(BIN)/python -m bench

ROUNDS ?= 20

chaos: setup ## damage a run on a Slurm cluster of 4 nodes ROUNDS=20 times, and prove that nothing is lost or doubled
	slurm/dev-cluster/own-cluster.sh $(BIN)/python tests/chaos/chaos_slurm.py --rounds $(ROUNDS) --seed 0

slurm-up: ## start a real Slurm cluster of 4 nodes on this machine (Debian, root)
	slurm/dev-cluster/slurm-up.sh

slurm-down: ## stop it
	slurm/dev-cluster/slurm-down.sh

clean: ## remove runs and caches, keep .venv
	rm -rf runs demo .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis bench/out
