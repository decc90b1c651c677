# PYTHON and VENV choose another Python or another virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STARTED := $(shell date +%Y-%m-%d_%H-%M-%S)
DEMO ?= runs/demo-$(STARTED)

.PHONY: help setup train test test-all test-gpu lint format clean retry

help:
	@echo "make setup     create a virtual environment in .venv with the development tools"
	@echo "make train     train a small Vim on digits, with and without fusion (5 minutes)"
	@echo "make test      run the tests, except the slow ones"
	@echo "make test-all  run all tests (two or three times as long)"
	@echo "make test-gpu  run the tests of a GPU (minutes)"
	@echo "make lint      check style and types"
	@echo "make format    format the code"
	@echo "make clean     remove the files of builds and tests"

# Set up again if the kernels could not be compiled and there is a compiler now.
RETRY := $(if $(wildcard famba/ops/native/build_failure.txt),$(if $(shell command -v c++),retry))

setup: $(VENV)/ready

retry:

$(VENV)/ready: pyproject.toml setup.py $(wildcard famba/ops/native/src/*) $(RETRY)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

train: setup
	$(BIN)/python train.py -m experiment=demo fusion=none,upper run_dir=$(DEMO)
	$(BIN)/famba report $(DEMO)

# One process for each core, up to eight, with one thread each: more threads than cores would slow one another down.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# Most of this time goes into compiling kernels, which all cores can do. Triton keeps them in ~/.triton/cache. If
# pytest-benchmark is installed, it would warn about several processes.
PYTEST_GPU := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 14 --dist worksteal -p no:benchmark

test: setup
	$(PYTEST) -m "not slow"

test-all: setup
	$(PYTEST)

test-gpu: setup
	$(PYTEST_GPU) -m gpu

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
