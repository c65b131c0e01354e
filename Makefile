PYTHON ?= python3
BIN := .venv/bin

# `uv run` in a parent process would make every Ray worker build its own environment.
export RAY_ENABLE_UV_RUN_RUNTIME_ENV := 0

.DEFAULT_GOAL := help
.PHONY: help install demo test test-cluster check options bench clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: .venv/.installed ## make .venv with the versions of constraints.txt (the other targets do it when needed)

# uv, since pip may choose a local CPU build of torch with which torchvision cannot be imported. Compiled
# here once: where Python may not write bytecode, each of Ray's processes would do it again (12 s of a core).
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cvmatch needs Python 3.11 or newer, and $(PYTHON) is %s: make PYTHON=python3.11 ..." % sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --editable . --group dev --constraints constraints.txt
	@touch $@

demo: install ## the whole pipeline on embedded data, in minutes, with no download: ends in demo/report.html
	$(BIN)/cvmatch demo

test: install ## all tests but the slow ones (pytest -m slow: deaths, resume and DDP)
	$(BIN)/pytest -m "not slow and not cluster"

test-cluster: install ## jobs on four nodes with an object store, and what goes wrong there; needs root
	$(BIN)/pytest -m "cluster and not slow" tests/cluster

check: install ## lint, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

options: install ## write docs/options.md from the settings
	$(BIN)/python -m tools.options

bench: install ## every benchmark, short
	@for script in $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py)); do echo "$$script"; $(BIN)/python $$script --quick || exit 1; done

clean: ## delete what tests and jobs left here; .venv, data and runs stay
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis demo
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
