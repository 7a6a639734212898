# What Matters in Transformers? Not All Attention is Needed: reference artifact. `make` lists the targets.

PROFILE ?= auto#  smoke, cpu, gpu, h200 (data/profiles); auto takes gpu where CUDA is present, otherwise cpu
MODEL ?=#         one model instead of the profile's: name, hub id, directory or .gguf file; for 07 also a series
NOTEBOOKS ?=#     some notebooks, by number: NOTEBOOKS="01 02"
FORCE ?=#         FORCE=1 measures again what is stored
PYTHON ?= python3#  Python 3.11 or newer, to make .venv with

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-builtin-rules --warn-undefined-variables
.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help env reproduce figures reference test lint clean distclean

RUN := .venv/bin/python
DRIVER := $(RUN) -m llmdrop_utils

help: ## list the targets
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20
	@echo; echo "Variables (make reproduce PROFILE=cpu):"
	@sed -nE 's/^([A-Z]+) \?=[^#]*#? *(.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

env: .venv/installed ## make .venv with the locked packages; every other target does this first

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}: set PYTHON=python3.12"'
	$(PYTHON) -m venv --clear .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	PYTHONWARNINGS=ignore $(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

reproduce: env ## measure, run the notebooks, write figures and scorecard (resumes; instant when nothing changed)
	$(DRIVER) reproduce --profile "$(PROFILE)" --model "$(MODEL)" --notebooks "$(NOTEBOOKS)" $(if $(FORCE),--force)

figures: env ## redraw all figures from the committed results: no model, no measurement
	$(DRIVER) figures

reference: env ## keep the tables of a run as reference results, to be committed
	$(DRIVER) reference --profile "$(PROFILE)" --model "$(MODEL)"

test: env ## run the tests (downloads the embedded model once)
	$(RUN) -m pytest -n 2 --dist loadfile

lint: env ## check style, format and notebooks
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean: ## remove what runs made, but keep downloads and .venv
	rm -rf data/results figures/smoke notebooks/rendered/smoke .pytest_cache .ruff_cache
	find notebooks -name '*.partial.ipynb' -delete -o -name '*.failed.ipynb' -delete

distclean: clean ## also remove downloads, converted and trained models, and .venv
	rm -rf data/cache .venv *.egg-info
