# Two commands: `make demo` and `make test`. Each builds the virtual environment first, once.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

export RAY_USAGE_STATS_ENABLED = 0
export MLFLOW_DISABLE_TELEMETRY = true

.PHONY: demo test fast lint format clean

demo: $(STAMP)
	@echo "espalier: the demo takes one or two minutes on two cores"
	$(BIN)/espalier demo

test: $(STAMP)
	@echo "espalier: all tests take about fifteen minutes on two cores; \`make fast\` about two, without Ray and what is slow"
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

fast: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder -m "not ray and not slow"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The stamp holds the checksum of what was installed, so an install that is there already is not repeated.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "espalier: $(PYTHON) not found; install Python 3.11 or newer, or name yours: make PYTHON=python3.12"; exit 2; }
	@echo "espalier: installing into $(VENV), once: 2.4 GB on disk without CUDA, two to five minutes; a line for each package follows"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
