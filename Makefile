# Every target but `help` runs `setup` first, which does nothing while constraints.txt and pyproject.toml stay the same.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Options for pip, for example another index for PyTorch.
PIP_ARGS ?=
STAMP := $(VENV)/.installed
# Two processes, each with whole files, in their order: the long ones do not come last.
IN_TWO := -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup lint test test-all smoke nightly bench clean

help:  ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## Make .venv, a virtual environment with exactly the locked versions

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "nightrails needs $(PYTHON); set PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) --constraint constraints.txt --editable '.[dev]'
	@touch $@

lint: setup  ## Format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: setup  ## The suite that CI runs (2 cores, under 12 minutes, no network)
	$(BIN)/pytest $(IN_TWO)

test-all: setup  ## Also the slow tests (the studies on tiny worlds), a real radosgw and the GPU, where they are at hand
	$(BIN)/pytest $(IN_TWO) -m ''

smoke: setup  ## The nightly job on a tiny log, in about a minute
	$(BIN)/python jobs/nightly_candidates.py --config conf/demo.yaml --set root=$${NIGHTRAILS_ROOT:-nightrails-data}/smoke \
		--set simulate.num_users=300 --set simulate.num_items=200 --set simulate.num_events=10000 --set train.max_epochs=1

nightly: setup  ## Simulate a 30-day log and run the whole nightly job on it
	$(BIN)/python jobs/nightly_candidates.py --config conf/demo.yaml

bench: setup  ## How fast the search is, against the paper's own way, faiss and PyTorch (5 to 15 minutes on 2 cores)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) --editable '.[bench]'
	$(BIN)/python jobs/study.py search

clean:  ## Remove the virtual environment and caches (never data)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build *.egg-info
