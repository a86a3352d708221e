# The two commands: `make demo` and `make test`. Each sets up what it needs first; `make help` lists the rest.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
SHELL  := /bin/bash

.PHONY: help setup setup-demo demo test test-fast test-containers check fix bench-loop bench-forge bench-node fuzz soak clean

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

setup: $(VENV)/.ready-dev      ## everything for developing and testing (browser, broker and database too)
setup-demo: $(VENV)/.ready-demo

$(VENV)/.ready-demo: pyproject.toml constraints.txt deploy/setup.sh
	PYTHON=$(PYTHON) VENV=$(VENV) bash deploy/setup.sh demo

$(VENV)/.ready-dev: pyproject.toml constraints.txt deploy/setup.sh
	PYTHON=$(PYTHON) VENV=$(VENV) bash deploy/setup.sh dev

demo: setup-demo               ## the whole loop, once, for real (add ARGS="--keep")
	$(BIN)/milpa-fleet demo $(ARGS)

test: setup                    ## all that must hold before anything lands
	$(BIN)/python -m pytest -m "not container" $(ARGS)

test-fast: setup               ## pure rules and fakes, for every save
	$(BIN)/python -m pytest -q -x -m "not broker and not llama and not torch and not flower and not fleet and not browser and not postgres and not namespace and not container" $(ARGS)

test-containers: setup         ## the compose file in real containers (needs podman or docker)
	$(BIN)/python -m pytest -m container --timeout=3000 $(ARGS)

check: setup                   ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: setup                     ## what the linters can mend by themselves
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-loop: setup-demo         ## the demo's figures as bench/results/loop.json
	$(BIN)/python -m bench.loop

BENCH = $(if $(DATA),--data $(DATA)) $(if $(ONLY),--only $(ONLY)) $(if $(THREADS),--threads $(THREADS)) \
	$(if $(SEED),--seed $(SEED)) $(if $(LIMIT),--limit $(LIMIT)) $(ARGS)

bench-forge: setup             ## the forge's figures as bench/results/forge.json (DATA=FOLDER, ONLY=key, THREADS=n, SEED=n, LIMIT=seconds)
	$(BIN)/python -m bench.forge $(BENCH)

bench-node: setup              ## the node's figures as bench/results/node.json (the same options)
	$(BIN)/python -m bench.node $(BENCH)

fuzz: setup                    ## a million damaged inputs into every parser; goes on where it ended (ONLY=name, N=count, SEED=n)
	$(BIN)/python -m tests.fuzz.run --executions $(or $(N),1000000) $(if $(ONLY),--only $(ONLY)) $(if $(SEED),--seed $(SEED)) $(ARGS)

soak: setup                    ## an hour of random histories of a real fleet, checked (SOAK=seconds, SEED=n)
	$(BIN)/python -m tests.history.machine --seconds $(or $(SOAK),3600) $(if $(SEED),--seed $(SEED)) $(ARGS)

clean:                         ## forget the environment and the runs
	rm -rf $(VENV) runs var .pytest_cache .mypy_cache .ruff_cache
