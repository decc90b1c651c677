# A virtual environment of its own, unless PYTHON and VENV say otherwise.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= runs/demo-$(shell date +%Y-%m-%d_%H-%M-%S)

.PHONY: help setup train test test-all test-gpu lint format clean retry

help:
	@echo "make train   set up and train a small Vim with and without fusion on digits (5 minutes)"
	@echo "make test    run the tests, but for the slow ones"
	@echo "make test-all  run all tests (two or three times as long)"
	@echo "make test-gpu  learn whether everything works on this machine's GPU (minutes)"
	@echo "make lint    check style and types"
	@echo "make format  put the code into the project's style"
	@echo "make clean   remove what builds and tests leave behind"

# Again where the kernels could not be compiled and now there is a compiler.
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

# A process for each core, up to eight, each with one thread: more threads than cores would wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# On a GPU most of the time goes into compiling kernels, which every core can do; Triton keeps them in ~/.triton/cache for
# the next run. Where pytest-benchmark is installed it would warn of several processes.
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
