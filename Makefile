# Two commands after a clone: `make demo` and `make test`. Each installs what it needs into .venv, once.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test lint
.DELETE_ON_ERROR:

demo: $(STAMP)
	@$(BIN)/layerroute demo

# Idle OpenMP threads sleep instead of spinning: the tests run many tiny operations.
test: $(STAMP)
	@OMP_WAIT_POLICY=passive $(BIN)/python -m pytest

lint: $(STAMP)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

$(STAMP): pyproject.toml constraints.txt
	@echo "Installing LayerRoute and its pinned dependencies into .venv (once; a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt pip
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
