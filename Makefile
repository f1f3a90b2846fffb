# Everything here sets itself up: a virtual environment in .venv with the versions of constraints.txt.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
    command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
    && echo $$p && exit; done; echo python3)
RUN := .venv/bin/python
NAME ?=
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format bench soak constraints wheel clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## ?/\1\t/' | \
	    while IFS="$$(printf '\t')" read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

setup:  ## make or refresh .venv (the others do this by themselves)
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "no $(PYTHON) found: install Python 3.11 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Mycel needs Python 3.11 or newer, and " \
	    + sys.executable + " is older: install one and name it, make PYTHON=/path/to/python3.11 ...")'
	@$(PYTHON) scripts/setup.py

demo: setup  ## train a small model, split it over four daemons, kill one in mid-sentence
	@$(RUN) examples/demo $(ARGS)

test: setup  ## the whole test suite on two processes (ARGS="tests/protocol -k ticket" for a part, on one)
	@$(RUN) -m pytest $(if $(ARGS),$(ARGS),-n 2 --dist loadfile tests)

check: setup  ## ruff, formatting, strict types, and the rules of the house
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pytest -q -m "not slow" tests/house

format: setup  ## put the sources into shape
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

bench: setup  ## measure: make bench NAME=rpc (SAVE=1 keeps the result in bench/results)
	@$(RUN) bench/run.py $(if $(SAVE),--save) $(NAME)

soak: setup  ## 20 seeded deaths of daemons in mid-sentence (ARGS="--seeds 100 --first 20"), 10 000 connections, a group's deaths in every phase, 10 minutes of its churn (SECONDS=60)
	@$(RUN) bench/run.py $(if $(SAVE),--save) soak $(ARGS)
	@MYCEL_TEST_CONNECTIONS=10000 $(RUN) -m pytest -q tests/node/host/test_churn.py
	@$(RUN) bench/run.py $(if $(SAVE),--save) kills
	@$(RUN) bench/run.py $(if $(SAVE),--save) churn --seconds $(or $(SECONDS),600)

constraints: setup  ## write constraints.txt from what .venv holds
	@$(RUN) scripts/constraints.py > constraints.txt.new && mv constraints.txt.new constraints.txt

wheel: setup  ## build the wheel and the source distribution into dist/
	@$(RUN) -m build --no-isolation

clean:  ## delete what the others made, .venv and trained models included
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .cache tests/e2e/js/node_modules
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
