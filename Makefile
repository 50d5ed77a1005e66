# SPDX-License-Identifier: Apache-2.0
#
# make demo | test | test-all | mutants | lint | bench | peers | scaling | busy | limits | plots | dist
# | clean. Each target sets up what it needs in .venv, once.
# make cuda builds with CUDA in .venv-cuda, and needs no GPU.
# make gpu builds with CUDA, tests and measures on a GPU, with the torch and pytest of PYTHON.
PYTHON ?= python3
# What pip installs as torch. To choose another: make clean, then make test TORCH='torch==2.11.*'
TORCH ?= -r requirements/torch.txt
VENV := .venv
CUDA_VENV := .venv-cuda
CUDA_RUN := $(CUDA_VENV)/bin/python
RUN := $(VENV)/bin/python
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml
# What is run where fastrnn was installed by itself.
SMOKE := tests/test_module.py tests/test_readme.py

# Two pips must not run in one environment at once.
.NOTPARALLEL:
.PHONY: demo test test-all mutants lint bench peers scaling busy limits plots cuda gpu dist clean

$(VENV)/pip:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/demo: requirements/torch.txt requirements/demo.txt | $(VENV)/pip
	$(RUN) -m pip install --quiet $(TORCH) -r requirements/demo.txt
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
	$(RUN) benchmarks/run.py bench

peers: $(VENV)/built $(VENV)/peers
	$(RUN) benchmarks/run.py peers

scaling: $(VENV)/built $(VENV)/peers
	$(RUN) benchmarks/run.py scaling

busy: $(VENV)/built $(VENV)/dev
	$(RUN) benchmarks/run.py busy

limits: $(VENV)/built $(VENV)/dev
	$(RUN) benchmarks/limits.py

plots: $(VENV)/built $(VENV)/dev
	$(RUN) benchmarks/plots.py

$(CUDA_VENV)/ready: requirements/cuda.txt requirements/demo.txt requirements/test.txt
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_RUN) -m pip install --quiet -r requirements/cuda.txt
	touch $@

# The objects stay in $(CUDA_VENV)/build, so only what was changed is compiled again. pytest as a
# program, unlike python -m pytest, does not look for fastrnn in this folder.
cuda: $(CUDA_VENV)/ready
	FASTRNN_CUDA=1 $(CUDA_RUN) setup.py --quiet build --build-base $(CUDA_VENV)/build \
		--build-lib "$$($(CUDA_RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	cd $(CUDA_VENV) && bin/python -m fastrnn.info
	$(CUDA_VENV)/bin/pytest $(SMOKE)

gpu:
	$(PYTHON) benchmarks/gpu.py

# The wheel comes from the sdist, and is tried where nothing else is installed.
dist: $(VENV)/demo
	rm -rf dist
	$(RUN) setup.py --quiet sdist
	$(RUN) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist dist/*.tar.gz
	$(PYTHON) -m venv dist/venv
	dist/venv/bin/python -m pip install --quiet $(TORCH) -r requirements/test.txt dist/*.whl
	cd dist && venv/bin/python -m fastrnn.info
	dist/venv/bin/pytest $(SMOKE)

clean:
	rm -rf $(VENV) $(CUDA_VENV) build dist fastrnn/*.so *.egg-info
