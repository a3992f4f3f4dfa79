# make demo | test | lint | install | clean. Each makes the environment first, if it is not there.
#
# VENV, EXTRAS and CONSTRAINTS can be set: `make install VENV=/opt/haste EXTRAS=gpu,serve` is what the Dockerfile runs.
# WORKERS says how many processes run tests, a file each at a time.
# PYTHON picks the interpreter; by default the first of 3.11 and newer that can make environments.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV ?= .venv
EXTRAS ?= dev
CONSTRAINTS ?= constraints-cpu.txt
PYTEST_ARGS ?=
WORKERS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(EXTRAS)

# Ray, gloo and pytest share the cores; without these each rank would start a thread a core.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo test lint format install clean help

help:
	@sed -n 's/^# //p' $(firstword $(MAKEFILE_LIST)) | head -1

install: $(STAMP)

demo: $(STAMP)
	@set -x
	test -f data/icd10/trn.json.gz || haste datasets build icd10 --out data/icd10
	haste prepare demo
	haste train demo
	haste evaluate runs/demo
	haste predict runs/demo -k 5 \
	  --text "Gout due to renal impairment, left hand" \
	  --text "Low-tension glaucoma, right eye" \
	  --text "Migraine with aura, not responding to treatment" \
	  --text "Alcohol dependence with withdrawal and delirium" \
	  --text "Cataract of the left eye in an old person"
	haste plot runs/demo

test: $(STAMP)
	@python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# The linters are tests; this runs them alone.
lint: $(STAMP)
	@python -m pytest tests/test_repository.py $(PYTEST_ARGS)

format: $(STAMP)
	@ruff check --fix
	ruff format

# DS_BUILD_OPS=0: DeepSpeed comes as source; building its operators ahead would need a compiler and torch inside pip's build.
# Training needs none of them. Everything is installed at once, so the constraints hold for every dependency.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@python=$$(
	  for name in $(PYTHON) python3.11 python3.12 python3.13 python3.14 python3; do
	    if "$$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo "$$name"; break; fi
	  done
	)
	if [ -z "$$python" ]; then
	  echo "make: no Python 3.11 or newer with venv found; install one (Debian: apt install python3-venv) or say PYTHON=/path/to/python" >&2
	  exit 1
	fi
	echo "making $(VENV) with $$("$$python" --version)"
	test -x $(BIN)/python || "$$python" -m venv $(VENV)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf $(VENV) build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
