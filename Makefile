# `make` alone prints this menu.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.complete-fn-ready
STATE := .cache/demo
ENGINE_LOCK := workers/complete_fn_workers/engine.lock
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: menu setup lock services demo service docs test test-latest test-oldest test-matrix test-long lint release-check model gpu-check clean

menu:
	@echo "make demo       set up, then classify and summarise real Debian packages through DuckDB on vLLM"
	@echo "make test       set up, then lint, type-check and run every test this machine can run"
	@echo "make test-long  the long forms of the checks as well; other versions of DuckDB and Polars; the oldest libraries"
	@echo "make test-latest  the newest of all libraries in an environment of its own: tests without the engine, canaries with it"
	@echo "make service    API, workers, Redis and PostgreSQL on this machine without containers; Ctrl-C ends them"
	@echo "make setup      only set up: .venv/ with the project, its tools and the engine, as the locks have them"
	@echo "make lock       the locks anew after a change in pyproject.toml (seconds); NEWEST=1: with the newest of all"
	@echo "make services   install PostgreSQL and Redis, which the tests start for themselves, where they are missing"
	@echo "make docs       build the documentation strictly into .cache/docs/site"
	@echo "make release-check  wheel and sdist, their metadata, and the README run from the wheel in an environment of its own"
	@echo "make model      train demo-llama again from Debian's package index (about 95 minutes on two cores)"
	@echo "make gpu-check  SwiftKV on this machine's CUDA card: tests and speed, as a report to send in (about 10 minutes)"
	@echo "make clean      remove .venv/ and .cache/"

setup: $(STAMP)

# Set-up is repeated when the project's requirements or a lock change. Without a lock for this Python, the newest of all
# that pyproject.toml allows is installed.
$(STAMP): pyproject.toml $(ENGINE_LOCK) $(wildcard lock-*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@lock=lock-$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt; \
	if [ -f $$lock ]; then \
	    echo "Installing the project and its tools into .venv, by $$lock ..."; \
	    $(PIP_INSTALL) --only-binary :all: --require-hashes -r $$lock && $(PIP_INSTALL) --no-deps --no-build-isolation -e .; \
	else \
	    echo "There is no $$lock: installing the project and the newest of its tools into .venv ..."; \
	    $(PIP_INSTALL) -e '.[dev]'; \
	fi
	@$(BIN)/complete-fn setup-engine
	@touch $@

# Versions that a lock has already stay while they fit. The engine's lock comes first and binds the others, so that
# set-up installs no package twice. uv is in .venv; what it writes names no index and no path.
lock:
	@test -x $(BIN)/uv || $(MAKE) setup
	@PYTHONPATH=workers $(BIN)/python -m complete_fn_workers.engine_lock $(if $(NEWEST),--newest)
	@for version in 3.11 3.12 3.13; do \
	    $(BIN)/uv pip compile pyproject.toml --extra dev --output-file lock-$$version.txt $(if $(NEWEST),--upgrade) \
	        --constraints $(ENGINE_LOCK) --python-version $$version --python-platform x86_64-manylinux_2_31 \
	        --only-binary :all: --generate-hashes --custom-compile-command "make lock" --quiet || exit 1; \
	done

demo: setup
	@COMPLETE_FN_HOME=$(STATE) $(BIN)/python sql/examples/demo.py

service: setup services
	@$(BIN)/python deploy/service.py

docs: setup
	$(BIN)/python -m docs.build

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The tests start servers of their own; a server that the system runs is neither used nor touched.
services:
	@if PATH="$$PATH:$$(echo /usr/lib/postgresql/*/bin | tr ' ' ':')" && command -v initdb postgres redis-server >/dev/null && \
	    [ "$$(command -v initdb postgres redis-server | wc -l)" = 3 ] && \
	    ls /usr/share/postgresql/*/extension/plpython3u.control >/dev/null 2>&1; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq postgresql redis-server && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq postgresql-plpython3-$$(ls /usr/lib/postgresql | sort -n | tail -1); \
	else echo "PostgreSQL with PL/Python and Redis are needed: sudo apt-get install postgresql postgresql-plpython3-15 redis-server (or your system's packages)"; exit 1; fi

# A test that its own time limit cannot end (it waits for a child without end, say) ends the run, with every stack.
# Two processes at a time: most tests wait for other processes more than they compute.
test: setup services lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not long and not gpu" --durations=20 -o faulthandler_timeout=960 -o faulthandler_exit_on_timeout=true

test-long: setup services lint
	$(BIN)/python -m pytest -m "not gpu"
	$(MAKE) test-matrix test-oldest

# Other versions than the locked ones: tests/other_versions.py says which, and where they are installed.
test-latest test-oldest test-matrix: setup services
	$(BIN)/python tests/other_versions.py $(@:test-%=%)

release-check: setup services
	rm -rf .cache/dist
	$(BIN)/python -m build --no-isolation --outdir .cache/dist
	$(BIN)/python -m twine check --strict .cache/dist/*
	$(BIN)/python tests/other_versions.py release

model: setup
	$(BIN)/python -m complete_fn_workers.demo_model.build --out .model

# The card needs vLLM's CUDA build (`pip install 'complete-fn[worker]'`), so the embedded CPU engine is not set up here.
gpu-check:
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -c 'import vllm' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,worker]'
	@$(BIN)/python benchmarks/engines/gpu_check.py

clean:
	rm -rf .venv .cache
