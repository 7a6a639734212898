# What Matters in Transformers? Not All Attention is Needed: reference artifact. `make` lists the targets.

PROFILE ?= auto#  smoke, cpu, ladder, gpu, gpu-shapes (data/profiles); auto takes gpu where CUDA is present, otherwise cpu
MODEL ?=#         one model instead of the profile's: name, hub id, directory or .gguf file; for 07 also a series
NOTEBOOKS ?=#     some notebooks, by number: NOTEBOOKS="01 02"
TIDY ?=#          TIDY=1 keeps one converted model on disk at a time, where models are run one by one
FORCE ?=#         FORCE=1 measures again what is stored
KIND ?= attention#  for make drop: attention, mlp, block or joint
N ?=#             for make drop: how many layers
KEEP ?=#          for make drop, instead of N: the share of next-token accuracy to keep, such as 0.98
OUT ?= dropped#   for make drop: a new folder
REPAIR ?=#        for make drop: REPAIR=1 refits what is kept, at no cost in inference
HEAL ?=#          for make drop: distil the dense model into what is kept, for a time such as 10min or a number of tokens
FORMAT ?= transformers#  for make drop: transformers, gguf, gguf-q4_k_m, vllm, mlx
PYTHON ?= python3#  Python 3.11 or newer, to make .venv with

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-builtin-rules --warn-undefined-variables
.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help env plan reproduce figures pages reference drop test test-fast coverage lint clean distclean

RUN := .venv/bin/python
LLMDROP := $(RUN) -m llmdrop_utils
export LLMDROP_CALLED_FROM := $(PWD)# where a relative MODEL begins that is not found from here (make -C)

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20
	@echo; echo "Variables (make reproduce PROFILE=cpu):"
	@sed -nE 's/^([A-Z]+) \?=[^#]*#? *(.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

env: .venv/installed ## make .venv with the locked packages; every other target does this first

.venv/installed: requirements.lock pyproject.toml setup.py
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}: set PYTHON=python3.12"'
	$(PYTHON) -m venv --clear .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	PYTHONWARNINGS=ignore $(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

plan: env ## say what a run would download, need and take, without doing any of it
	$(LLMDROP) plan --profile "$(PROFILE)" --model "$(MODEL)" --notebooks "$(NOTEBOOKS)"

reproduce: env ## measure, run the notebooks; all goes to data/results/<run> (resumes; instant when nothing changed)
	$(LLMDROP) reproduce --profile "$(PROFILE)" --model "$(MODEL)" --notebooks "$(NOTEBOOKS)" --force="$(FORCE)" $(if $(TIDY),--tidy)

figures: env ## redraw the committed figures from the committed tables: no model, no measurement
	$(LLMDROP) figures

pages: env ## render the committed notebooks anew from the committed tables (their live examples need the model)
	$(LLMDROP) figures --pages

reference: env ## keep tables, figures and pages of a run as the reference, to be committed
	$(LLMDROP) reference --profile "$(PROFILE)" --model "$(MODEL)"

drop: env ## drop layers of MODEL, and write what is left: make drop MODEL=smollm2-135m N=8 OUT=dropped FORMAT="transformers gguf"
	$(LLMDROP) drop "$(MODEL)" --kind "$(KIND)" $(if $(N),-n "$(N)") $(if $(KEEP),--keep "$(KEEP)") $(if $(REPAIR),--repair) $(if $(HEAL),--heal "$(HEAL)") --to "$(OUT)" --format $(FORMAT)

test: env ## run the tests (downloads the embedded model once)
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: env ## run the tests that need no real model, no training and no notebook: under a minute
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not real"

coverage: env ## run the tests and report how much of the package they reach
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=term-missing:skip-covered

lint: env ## check style, format, notebooks and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean: ## remove what runs made, but keep downloads and .venv
	rm -rf data/results .pytest_cache .ruff_cache .mypy_cache .coverage*

distclean: clean ## also remove downloads, converted and trained models, and .venv
	rm -rf data/cache .venv build *.egg-info
