# Fresh machine with Python 3.11+ and make: `make demo`, then `make test`.
PYTHON ?= python3
BIN := .venv/bin
.PHONY: install demo test test-slow lint format docs clean bench bench-quick

install: .venv/.installed  ## the package and what it needs, into .venv

demo: .venv/.installed  ## install and run the quickstart recipe to a verified ONNX file
	$(BIN)/flatcompress run configs/quickstart.yaml

test: .venv/.test-installed  ## the tests, without the slow ones
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: .venv/.test-installed  ## everything that takes long
	$(BIN)/python -m pytest -m slow

lint: .venv/.dev-installed  ## style, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.dev-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/.docs-installed  ## the documentation site, into site/
	$(BIN)/mkdocs build --strict

bench-quick: .venv/.test-installed  ## every quick benchmark; prints tables, writes benchmarks/results/
	$(BIN)/python -m benchmarks --quick

bench: .venv/.test-installed  ## every benchmark in full (hours), with every figure and page of docs/results
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv runs build dist site *.egg-info

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -e .
	touch $@

.venv/.test-installed: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

.venv/.dev-installed: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

.venv/.docs-installed: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[docs]"
	touch $@
