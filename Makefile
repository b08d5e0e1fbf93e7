# Every target does its own set-up in .venv (dependencies, PyTorch, compiled modules) and is quick when repeated.
PYTHON ?= python3
# What to install PyTorch from, e.g. TORCH="torch==2.13.0 torchvision". The default is the newest release.
TORCH ?= torch torchvision
# What `make compat` tries; 2.15.0@python3.12 asks for another Python.
COMPAT ?= 2.10.0 2.11.0 2.12.1 2.13.0+cpu 2.13.0 2.14.1 2.15.0
# More arguments for pytest, e.g. ARGS="-k dual -x".
ARGS ?=

BIN := .venv/bin
DIST := dist
INTERPRETED := $(wildcard tests/test_*_triton.py)

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile

demo: .venv/installed  ## train a robust classifier on real data, with and without armor (about two minutes)
	$(BIN)/armor train --preset demo

# Triton's interpreter must be chosen before Triton is imported, hence two runs; 5 means that ARGS left none here.
test: .venv/installed  ## all tests, those of Triton kernels in its interpreter
	$(if $(INTERPRETED),TRITON_INTERPRET=1 $(BIN)/python -m pytest $(INTERPRETED) $(ARGS) || [ $$? -eq 5 ])
	$(BIN)/python -m pytest $(addprefix --ignore=,$(INTERPRETED)) $(ARGS)

audit: .venv/installed  ## all that can be proven of the GPU kernels on a CPU, one row a kernel and architecture
	PYTHONPATH=tests $(BIN)/python -m kernelcheck.audit $(ARGS)

bench: .venv/installed  ## time the operators against what they replace
	$(BIN)/python -m benchmarks dual transport rowloss attack train

# abi3 wheels, tagged by auditwheel with the oldest C library that they load on. With no GPU in sight the CUDA module is
# compiled for all architectures of a release. What .venv has without CUDA, or under ARMOR_CUDA=0, has no CUDA wheel.
PACK = CUDA_VISIBLE_DEVICES= $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheels .
wheel: .venv/installed  ## wheels in dist/: one for the CPU alone and, where the modules were compiled for CUDA, one for CUDA
	rm -rf build/wheels build/lib.*
	ARMOR_CUDA=0 $(PACK)
	[ "$$ARMOR_CUDA" = 0 ] || ! grep -q '"cuda"' python/armor/_build.json || ARMOR_CUDA=1 $(PACK)
	PATH=$(BIN):$$PATH auditwheel repair --exclude 'libtorch*' --exclude 'libcudart*' --wheel-dir $(DIST) build/wheels/*.whl

compat: wheel  ## try the newest wheel on other versions of PyTorch (an hour, and gigabytes of downloads for each)
	$(BIN)/python tests/compat.py "$$(ls -t $(DIST)/*.whl | head -n 1)" $(COMPAT)

# With the PyTorch that PYTHON has, and then without the internet; only if it has none, with that of .venv.
gpu:  ## tests and benchmarks on this machine's GPU, and a report of them to send to us (ARGS="--minutes 10" for less)
	if $(PYTHON) -c 'import torch' 2> /dev/null; then $(PYTHON) -m benchmarks.gpu $(ARGS); \
	else $(MAKE) --no-print-directory .venv/installed && $(BIN)/python -m benchmarks.gpu $(ARGS); fi

lint: .venv/installed  ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# PyTorch comes first because armor is compiled against it, and without build isolation nothing is downloaded twice.
# torchattacks, a peer in tests and benchmarks, pins a requests of 2021 that it does not use here.
.venv/installed: pyproject.toml setup.py $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "setuptools>=77" ninja $(TORCH)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[train,eval,dev]"
	$(BIN)/python -m pip install --quiet --no-deps torchattacks==3.5.1
	touch $@

.PHONY: help demo test audit bench wheel compat gpu lint
