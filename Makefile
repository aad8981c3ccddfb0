# make sweep | test | ui: each installs what it needs, once.
# make bench | bench-numerics | bench-memory | bench-acceptance | bench-early | bench-sensitivity |
#      bench-mixed | bench-load | bench-workers | bench-peers: what the documentation's figures come from.
# make sweep CONFIG=configs/minilm.yaml EXTRAS=minilm: what a config needs beyond the base.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt
CONFIG ?= configs/digits.yaml
STORE ?= mlruns
PORT ?= 5000
EXTRAS ?=
comma := ,
# The stamp of the base, or of the base with some extras.
STAMP := $(VENV)/.installed$(if $(EXTRAS),-$(subst $(comma),-,$(EXTRAS)))

.PHONY: sweep test ui bench bench-numerics bench-memory bench-acceptance bench-early \
        bench-sensitivity bench-mixed bench-load bench-workers \
        bench-peers venv dev format clean

sweep: venv
	$(BIN)/halfstep sweep $(CONFIG) --store $(STORE)

test: dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

ui: venv
	$(BIN)/halfstep ui --store $(STORE) --port $(PORT)

bench: venv
	$(BIN)/python -m benchmarks.sweep_over_floor

bench-numerics: venv
	$(BIN)/python -m benchmarks.numerics

bench-memory: venv
	$(BIN)/python -m benchmarks.memory

bench-acceptance: venv
	$(BIN)/python -m benchmarks.acceptance

bench-early: venv
	$(BIN)/python -m benchmarks.early_stopping

bench-sensitivity: venv
	$(BIN)/python -m benchmarks.sensitivity

bench-mixed: venv
	$(BIN)/python -m benchmarks.mixed_precision

bench-load: venv
	$(BIN)/python -m benchmarks.load

bench-workers: venv
	$(BIN)/python -m benchmarks.workers

bench-peers: dev
	$(BIN)/python -m benchmarks.peers

venv: $(STAMP)
dev: $(VENV)/.installed-dev

# The stamps depend on what is to be installed, so a second run installs nothing.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned set into $(VENV) (minutes, the first time)" >&2
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(PIP) --editable '.[$(if $(filter dev,$*),dev,$(EXTRAS))]'
	touch $@

format: dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
