# `make demo` and `make test` are all a newcomer needs: each sets everything up first (8 minutes, once).
.DEFAULT_GOAL := help
.PHONY: help setup ready demo test test-fast test-architectures check docs format ui up clean
BIN := .venv/bin
unexport PYTHONDONTWRITEBYTECODE # tests start hundreds of processes, which would compile all that they import
PARALLEL := -n auto --maxprocesses 4 --dist loadfile # tests/scheduling.py says which tests stay together

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: ## virtual environment, pinned packages, llama.cpp with its programs
	@scripts/setup.sh --again

ready: # as setup, but nothing to do takes half a second
	@scripts/setup.sh

demo: ready ## re-quantize SmolLM2-135M on HumanEval, measure and track everything
	@$(BIN)/samq demo

test: ready ## all tests, the fast ones first
	$(BIN)/pytest -m "not e2e and not slow" $(PARALLEL)
	$(BIN)/pytest -m "(e2e or slow) and not architectures" $(PARALLEL)

test-fast: ready ## the fast tests only
	$(BIN)/pytest -m "not e2e and not slow" $(PARALLEL)

test-architectures: ready ## every architecture that SAMQ takes, and the table of them in docs/
	rows=$$(mktemp -d) && SAMQ_ARCHITECTURES=$$rows $(BIN)/pytest tests/architectures $(PARALLEL) && $(BIN)/python -m tests.architectures.table $$rows

check: ready ## lint, format, types, layers, documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs: ready ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: ready ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ui: ready ## serve MLflow's and Prefect's pages here
	@$(BIN)/samq ui

up: ready ## MLflow, Prefect's server and a worker here, with the deployments of prefect.yaml
	@$(BIN)/samq up

clean: ## forget all that was built and measured (.samq), but not the set-up (.venv)
	rm -rf .samq
