# Every target does its own set-up in .venv (dependencies, PyTorch, compiled modules) and is quick when repeated.
PYTHON ?= python3
# What to install PyTorch from, e.g. TORCH="torch==2.13.0 torchvision". The default is the newest release.
TORCH ?= torch torchvision
# More arguments for pytest, e.g. ARGS="-k dual -x".
ARGS ?=

BIN := .venv/bin
INTERPRETED := $(wildcard tests/test_*_triton.py)

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile

demo: .venv/installed  ## train a robust classifier on real data, with and without armor (about two minutes)
	$(BIN)/armor train

# Triton's interpreter must be chosen before Triton is imported, hence two runs; 5 means that ARGS left none here.
test: .venv/installed  ## all tests, those of Triton kernels in its interpreter
	$(if $(INTERPRETED),TRITON_INTERPRET=1 $(BIN)/python -m pytest $(INTERPRETED) $(ARGS) || [ $$? -eq 5 ])
	$(BIN)/python -m pytest $(addprefix --ignore=,$(INTERPRETED)) $(ARGS)

bench: .venv/installed  ## time the operators against what they replace
	$(BIN)/python -m benchmarks dual transport rowloss attack

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

.PHONY: help demo test bench lint
