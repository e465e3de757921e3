# `make` alone prints this menu.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.complete-fn-ready
STATE := .cache/demo

.PHONY: menu setup demo test test-long lint model clean

menu:
	@echo "make demo       set up, then classify and summarise real Debian packages through DuckDB on vLLM"
	@echo "make test       set up, then lint, type-check and run every test this machine can run"
	@echo "make test-long  the long forms of the checks as well"
	@echo "make setup      only set up: .venv/ with the project, its tools and the engine"
	@echo "make model      train demo-llama again from Debian's package index (about 95 minutes on two cores)"
	@echo "make clean      remove .venv/ and .cache/"

setup: $(STAMP)

# Set-up is repeated when the project's requirements or the engine's lock change.
$(STAMP): pyproject.toml workers/complete_fn_workers/engine.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing the project and its tools into .venv ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@$(BIN)/complete-fn setup-engine
	@touch $@

demo: setup
	@COMPLETE_FN_HOME=$(STATE) $(BIN)/python sql/examples/demo.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: setup lint
	$(BIN)/python -m pytest -m "not long and not gpu"

test-long: setup lint
	$(BIN)/python -m pytest -m "not gpu"

model: setup
	$(BIN)/python -m complete_fn_workers.demo_model.build --out .model

clean:
	rm -rf .venv .cache
