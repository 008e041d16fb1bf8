# Every target does its own set-up: a virtual environment .venv with the exact tested versions, on a machine that has
# only Python (3.11 or newer) and git. Inside an environment in which `pip install -e .` was run, that one is used.
SHELL := /bin/bash
# Asked from elsewhere, since the checkout's own egg-info would answer for any Python started in it.
ACTIVE := $(shell cd / && python -c 'import importlib.metadata as m; m.distribution("fer-bench")' 2>/dev/null && echo yes)
ifeq ($(ACTIVE),yes)
PYTHON := python
SETUP := .setup-active
else
PYTHON := .venv/bin/python
SETUP := .venv/.complete
endif

.PHONY: help setup demo test docs reliability reliability-long counters test-minimum soak test-slow lint format .setup-active
.DEFAULT_GOAL := help

# What a run is made of: data, networks, training, evaluation, the report's data, W&B.
MINIMUM := $(addprefix tests/test_,train.py data.py store.py models.py losses.py transforms.py evaluate.py safety.py supply_chain.py wandb.py)

help:  ## explain every target
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(SETUP)  ## create .venv with the tested versions (about 2 minutes, 6 GB)

.venv/.complete: pyproject.toml constraints.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,faces,export,explain,sweeps,dashboard,docs]'
	@touch $@

.setup-active:
	@python -c 'import pytest, pytest_timeout, hypothesis, ruff, mypy, facenet_pytorch, onnxruntime, hydra_plugins.hydra_optuna_sweeper, wandb_workspaces, pytorch_grad_cam, zensical, mkdocstrings_handlers.python' 2>/dev/null || \
	  python -m pip install --quiet --editable '.[dev,faces,export,explain,sweeps,dashboard,docs]'

demo: $(SETUP)  ## train on synthetic faces: no download, under 8 core-minutes
	$(PYTHON) -m fer.train experiment=demo

test: $(SETUP)  ## the quick tests, about 7 core-minutes; FER_DATA=/path/to/data adds those on real data
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest

reliability: $(SETUP)  ## runs and sweeps killed in their middle go on to the same figures, under 3 core-minutes
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m 'reliability and not slow' $(addprefix tests/test_,reliability.py sweep.py wandb.py)

reliability-long: export OMP_NUM_THREADS := 1
reliability-long: $(SETUP)  ## 200 kills of a training, 40 of its workers, 20 of the command, failing system calls; 20 core-minutes
	rm -f docs/results/reliability.json
	for seed in 0 1 2 3 4; do $(PYTHON) tests/kills.py forked 40 docs/results/reliability.json $$seed || exit 1; done
	for seed in 0 1; do $(PYTHON) tests/kills.py command 10 docs/results/reliability.json $$seed || exit 1; done
	$(PYTHON) tests/kills.py workers 40 docs/results/reliability.json 0
	$(PYTHON) tests/kills.py syscalls 0 docs/results/reliability.json 0
	$(PYTHON) -m fer.reporting.manual

test-minimum: .venv-minimum/.complete  ## tests of the main parts, with the oldest versions pyproject.toml admits
	OMP_NUM_THREADS=1 .venv-minimum/bin/python -m pytest $(MINIMUM)

.venv-minimum/.complete: pyproject.toml tests/minimum.py
	python3 -m venv .venv-minimum
	.venv-minimum/bin/python -m pip install --quiet --upgrade pip
	.venv-minimum/bin/python tests/minimum.py > .venv-minimum/minimum.txt
	.venv-minimum/bin/python -m pip install --quiet --prefer-binary --constraint .venv-minimum/minimum.txt --editable '.[dev]'
	@touch $@

soak: $(SETUP)  ## 10,000 steps and 10 jobs of a sweep watched for leaks, about 8 core-minutes
	$(PYTHON) tests/soak.py

counters: $(SETUP)  ## operators and host reads per step, images decoded: fails on a rise, under 2 core-minutes
	$(PYTHON) tests/counters.py

test-slow: $(SETUP)  ## the slow tests
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m slow

docs: $(SETUP)  ## the documentation, into site/: a broken link, a page without a place or an example that ends in an error fails
	$(PYTHON) -m fer.reporting.manual
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests/test_docs.py -m '' -k 'navigation or as_written'
	$(PYTHON) -m zensical build --strict
	@! grep -rhoE '<(script|link|img)[^>]+(src|href)="?https?:[^" >]*' site --include=*.html

lint: $(SETUP)  ## ruff and mypy
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

format: $(SETUP)  ## put the code into shape
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .
