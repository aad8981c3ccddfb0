# make sweep | test | ui | bench | bench-numerics: each installs what it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt
CONFIG ?= configs/digits.yaml
STORE ?= mlruns
PORT ?= 5000

.PHONY: sweep test ui bench bench-numerics venv dev format clean

sweep: venv
	$(BIN)/halfstep sweep $(CONFIG) --store $(STORE)

test: dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n 2

ui: venv
	$(BIN)/halfstep ui --store $(STORE) --port $(PORT)

bench: venv
	$(BIN)/python -m benchmarks.sweep_over_floor

bench-numerics: venv
	$(BIN)/python -m benchmarks.numerics

venv: $(VENV)/.installed
dev: $(VENV)/.installed-dev

# The stamps depend on what is to be installed, so a second run installs nothing.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned set into $(VENV) (minutes, the first time)" >&2
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	touch $@

format: dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
