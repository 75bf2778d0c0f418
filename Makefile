# Everything runs in a virtual environment of its own; a fresh machine needs Python >= 3.11 and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help run test lint types unit test-system storm test-deploy bench deb test-boot format clean

help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

run: $(VENV)/installed ## Run the daemon in the foreground on config.example.toml
	exec $(BIN)/lpechod serve --config config.example.toml

test: lint types unit ## Lint, check types and test the daemon

lint: $(VENV)/dev ## Check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/dev ## Check types
	$(BIN)/mypy

unit: $(VENV)/dev ## Test the daemon from the inside, with branch coverage
	$(BIN)/python -m pytest -n auto --ignore=tests/system --ignore=tests/boot \
		--ignore=tests/deploy --ignore=tests/packaging --cov --cov-report=term

test-system: $(VENV)/dev ## Test whole daemons from the outside; adds to the coverage of unit
	$(BIN)/python -m pytest -n auto tests/system --ignore=tests/system/test_storm.py \
		--cov --cov-append --cov-report=term

storm: $(VENV)/dev ## Run the daemon through reloads, kills and stops under load
	$(BIN)/python -m pytest tests/system/test_storm.py

test-deploy: $(VENV)/dev ## Test what is around the daemon: Prometheus, HAProxy, manual pages
	$(BIN)/python -m pytest -n auto tests/deploy tests/packaging

bench: $(VENV)/bench ## Measure echoes, against asyncio and uvloop, and what idle connections cost
	$(BIN)/python tests/bench/bench_echo.py
	$(BIN)/python tests/bench/bench_pollers.py

deb: ## Build the Debian packages into dist/ (as root)
	packaging/build-deb

test-boot: $(VENV)/dev deb ## Install the package on a Debian 13 that boots in a container (as root)
	$(BIN)/python -m pytest tests/boot -v --timeout=600 -o faulthandler_timeout=0

format: $(VENV)/dev ## Format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## Remove the environment and everything that tools have left
	rm -rf $(VENV) build dist *.egg-info .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "lpechod needs Python 3.11 or later: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV) \
		|| { rm -rf $(VENV); echo "No virtual environment: on Debian, apt install python3-venv"; exit 1; }

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@ $(VENV)/installed

# There may be no uvloop for a platform: the benchmarks go on without it, and say so.
$(VENV)/bench: $(VENV)/dev
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[bench]' \
		&& touch $@ || echo "uvloop could not be installed"
