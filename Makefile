# Each target makes .venv from this repository's files when it is missing or older than they are.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= auto
READY := $(VENV)/.ready

.PHONY: help setup demo docs pages artefacts tracer-parity test test-fast lint types bench bench-loading bench-splice bench-training bench-evals clean
help:
	@echo "make demo   the main job, offline, on the bundled model"
	@echo "make docs   the documentation as a site, in build/site"
	@echo "make pages  the tables and numbers of the pages, from committed files"
	@echo "make artefacts  everything that is made from the bundled model and suite, as far as it is left behind"
	@echo "make test-fast  tests of every part of the package, for each edit;  make test  all tests"
	@echo "make tracer-parity  attribution graphs beside circuit-tracer's, in an environment of its own;  ARGS=--keep writes the numbers"
	@echo "make lint   ruff;  make types  pyright;  make setup  only the environment"
	@echo "make bench  benchmarks; a run that was stopped continues (bench-loading, bench-splice, bench-training, bench-evals: a part)"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/python scripts/demo.py

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

pages: $(READY)
	$(BIN)/python -m scripts.pages

# A stopped run goes on where it was; ARGS=--list only says what is left behind.
artefacts: $(READY)
	$(BIN)/python -m scripts.artefacts $(ARGS)

# Makes the environment of circuit-tracer in build/, in which some slow tests run from then on.
tracer-parity: $(READY)
	$(BIN)/python -m scripts.tracer_parity $(ARGS)

# JOBS=4 runs four worker processes; JOBS=0 runs all tests in one process.
test-fast test: export OMP_NUM_THREADS := 1

test-fast: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow"

test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/pyright

bench: $(READY)
	$(BIN)/python -m benchmarks

bench-loading: $(READY)
	$(BIN)/python -m benchmarks first_feature loading remote

bench-splice: $(READY)
	$(BIN)/python -m benchmarks sparse splice generation layered_splice

bench-training: $(READY)
	$(BIN)/python -m benchmarks buckets mixing store training_step training_suite layered_training

bench-evals: $(READY)
	$(BIN)/python -m benchmarks evals

clean:
	rm -rf $(VENV) dist demo-output
