# Two commands do everything on a fresh machine with Python 3.11, make and (later) a C compiler:
#     make train     environment, data, a training run on 13 ranks, text, a report
#     make test      the whole suite, serial and under mpiexec

PYTHON ?= python3
MPI ?= auto
RANKS ?= 13
TEST_SIZES ?= 1 3 13
SMOKE_SIZES ?= 2 4 7 64
RUNS ?= runs

BIN := .venv/bin
MPIEXEC := $(BIN)/mpiexec

# Open MPI refuses root, and more ranks than cores, unless told. Other MPIs ignore these.
ifeq ($(shell id -u),0)
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
endif
OVERSUBSCRIBE := PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe OMPI_MCA_rmaps_base_oversubscribe=1
MPIRUN = env $(if $(shell [ $(1) -gt $$(nproc) ] && echo more),$(OVERSUBSCRIBE)) $(MPIEXEC) -n $(1)

.DEFAULT_GOAL := help
.PHONY: help install train test test-serial test-mpi test-smoke test-matrix test-slurm optional lint docs clean

help: ## show this list
	@grep -hE '^[a-z%-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16
	@echo "test-N          run the MPI tests on N ranks"
	@echo "Variables: PYTHON=$(PYTHON)  MPI=auto|system|wheel  RANKS=$(RANKS) (of make train)  RUNS=$(RUNS)"

install: .venv/installed ## environment in .venv, with an MPI in .venv/bin/mpiexec

.venv/installed: setup.cfg pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "$(PYTHON) is older than Python 3.11: name a newer one, as in make install PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	    { echo "Python's venv module is missing: apt install python3-venv, or name another with PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@MPI=$(MPI) sh jobs/choose-mpi.sh .venv
	@ls hiermpi/kernels/_layers*.so >/dev/null 2>&1 || \
	    echo "The C kernels were not built: training uses numpy, slower. Install a C compiler and make clean install."
	@touch $@

train: install ## train on the built-in corpus, 13 ranks, and write some text; again: continue, or say it is done
	@mkdir -p $(RUNS) && test -f $(RUNS)/stdlib.h5 || $(BIN)/hiermpi prepare stdlib --out $(RUNS)/stdlib.h5
	$(call MPIRUN,$(RANKS)) $(BIN)/hiermpi train --data $(RUNS)/stdlib.h5 --run $(RUNS)/first --config tiny
	$(BIN)/hiermpi generate $(RUNS)/first --prompt "def " --tokens 300
	$(BIN)/hiermpi report $(RUNS)/first

test: test-serial test-mpi test-smoke ## the whole suite, serial and under mpiexec

test-serial: install ## the tests of one process, and those that launch mpiexec themselves
	$(BIN)/python -m pytest -q

test-mpi: $(TEST_SIZES:%=test-%) ## the MPI tests on each of TEST_SIZES ranks

# -m mpi4py: an exception on one rank ends all. timeout: nothing can hang for ever.
test-%: install
	env $(OVERSUBSCRIBE) timeout --kill-after=10 300 $(MPIEXEC) -n $* \
	    $(BIN)/python -m mpi4py -m pytest -q -x --with-mpi tests/mpi

test-smoke: install ## the MPI tests that depend most on the number of ranks, on each of SMOKE_SIZES
	for n in $(SMOKE_SIZES); do \
	    env $(OVERSUBSCRIBE) timeout --kill-after=10 300 $(MPIEXEC) -n $$n \
	        $(BIN)/python -m mpi4py -m pytest -q -x --with-mpi tests/mpi -m smoke || exit 1; \
	done

test-matrix: install ## every combination of ranks, routing, coordinators and reduction, and broken plug-ins (minutes)
	env HIERMPI_TEST_MATRIX=all $(BIN)/python -m pytest -q tests/plugins
	for n in 1 2 3 13 26 64; do \
	    env HIERMPI_TEST_MATRIX=all $(OVERSUBSCRIBE) timeout --kill-after=10 1200 $(MPIEXEC) -n $$n \
	        $(BIN)/python -m mpi4py -m pytest -q -x --with-mpi tests/mpi/test_equality.py tests/mpi/test_reproducible.py || exit 1; \
	done

test-slurm: install ## the job scripts on a private SLURM of four emulated nodes; root may have it installed by apt
	sh tests/slurm/run.sh $(BIN)/python

# PyTorch is large: where it cannot be had, its tests are skipped and say so.
optional: install ## the tests that need PyTorch and transformers, which are installed where they can be
	@$(BIN)/python -c 'import torch, transformers' 2>/dev/null || timeout 900 $(BIN)/python -m pip install --quiet \
	    --disable-pip-version-check --editable '.[torch]' 'transformers>=4.40' || echo "PyTorch cannot be installed here"
	$(BIN)/python -m pytest -q -rs tests/plugins/test_torch.py tests/interchange -k "torch or transformers or ddp or same"

lint: install ## ruff and mypy
	@test -x $(BIN)/ruff -a -x $(BIN)/mypy || \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[lint]'
	$(BIN)/ruff check hiermpi tests examples docs
	$(BIN)/mypy
	MYPYPATH=tests:examples $(BIN)/mypy --allow-untyped-defs --explicit-package-bases tests/[!t]*.py examples/*.py

docs: install ## the documentation site, into build/docs; a warning is an error
	@$(BIN)/python -c 'import sphinx, myst_parser, furo' 2>/dev/null || \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "the site is in build/docs/index.html"

clean: ## remove the environment and build products, never runs
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
