# SPDX-License-Identifier: Apache-2.0
#
# make demo | test | test-all | mutants | lint | bench | peers | scaling | busy | limits | plots | clean.
# Each target sets up what it needs in .venv, once.
# make gpu builds with CUDA, tests and measures on a GPU, with the torch and pytest of PYTHON.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml

# Two pips must not run in one environment at once.
.NOTPARALLEL:
.PHONY: demo test test-all mutants lint bench peers scaling busy limits plots gpu clean

$(VENV)/pip:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/demo: requirements/demo.txt | $(VENV)/pip
	$(RUN) -m pip install --quiet -r requirements/demo.txt
	touch $@

$(VENV)/dev: requirements/dev.txt $(VENV)/demo
	$(RUN) -m pip install --quiet -r requirements/dev.txt
	touch $@

$(VENV)/peers: requirements/peers.txt $(VENV)/dev
	$(RUN) -m pip install --quiet -r requirements/peers.txt
	touch $@

# Editable: changes of Python files need no build.
$(VENV)/built: $(SOURCES) $(VENV)/demo
	$(RUN) -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

demo: $(VENV)/built
	$(RUN) examples/dc_motor.py

test: $(VENV)/built $(VENV)/dev
	$(RUN) -m pytest tests

# The rest of the crosses too, and what takes real time: twenty minutes.
test-all: $(VENV)/built $(VENV)/dev
	$(RUN) -m pytest tests -m ""

# Faults that the tests have to notice: hours.
mutants: $(VENV)/built $(VENV)/dev
	$(RUN) tests/mutants.py

lint: $(VENV)/dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	find csrc tests benchmarks -regex '.*\.\(cpp\|h\|inl\|cu\|cuh\)' | xargs $(VENV)/bin/clang-format --dry-run --Werror
	$(RUN) -m mypy

bench: $(VENV)/built $(VENV)/dev
	$(RUN) benchmarks/run.py

peers: $(VENV)/built $(VENV)/peers
	$(RUN) benchmarks/compare.py

scaling: $(VENV)/built $(VENV)/peers
	$(RUN) benchmarks/scaling.py

busy: $(VENV)/built $(VENV)/dev
	$(RUN) benchmarks/busy.py

limits: $(VENV)/built $(VENV)/dev
	$(RUN) benchmarks/limits.py

plots: $(VENV)/built $(VENV)/dev
	$(RUN) benchmarks/plots.py

gpu:
	$(PYTHON) benchmarks/gpu.py

clean:
	rm -rf $(VENV) build fastrnn/*.so *.egg-info
