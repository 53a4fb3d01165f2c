# Two commands: `make swap` and `make test`. Both make a virtual environment, build, and do nothing twice.
PYTHON ?= python3
KVKERNELS_CUDA ?= AUTO
KVKERNELS_WERROR ?= OFF
# Arguments for benchmarks/swap.py, pages.py, layouts.py and mover.py, pytest, tests/e2e/run.py, tests/torches/run.py and
# tests/mutants/run.py.
ARGS ?=
# Processes of make test and make simgpu; auto is one a core.
JOBS ?= auto

VENV := .venv
BIN := $(VENV)/bin
# vLLM pins its own torch, numpy and some eighty others.
ENGINE := .venv-vllm
# A later vLLM, which has no CPU build: its Python files over the older one's compiled ones.
LATER_VLLM := 0.33.0
LATER := .venv-vllm-0.33
# An environment for each other torch and Python.
TORCHES := .venv-torches
# torch's CUDA build, for the stand-in for CUDA.
STAND_IN := .venv-simgpu
SIMGPU := $(CURDIR)/build/simgpu
# What the dry run tests; make simgpu runs them all.
DRY_TESTS = tests/torch_cuda/test_hardware_ids.py
DRY_FIGURES = --scale 0.001 --fragments 512,32768 --counts 64,50000
SOURCES := $(sort $(shell find csrc -type f)) CMakeLists.txt setup.py pyproject.toml
# Without the libraries that a build has put beside the modules.
PACKAGE_SOURCES = $(wildcard kvkernels/*.py) $(patsubst %/__init__.py,%,$(wildcard kvkernels/*/__init__.py))
CPP_FILES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# CMake and ninja come from the virtual environment.
export PATH := $(abspath $(BIN)):$(PATH)
export KVKERNELS_CUDA KVKERNELS_WERROR
# make is about the compiled library, whatever the shell asks of a pip install.
export KVKERNELS_COMPILED = ON

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help build wheel docs swap pages layouts calls memory mover remote remote-long sass test simgpu simgpu-build gpu gpu-dry-run sanitize \
  e2e e2e-0.33 e2e-long torches mutants lint format audit clean distclean always

help:
	@echo "make swap       build, check every byte and time the copies (ARGS=\"--model qwen3-32b\"; see --help)"
	@echo "make pages      the page-size table of benchmarks/results"
	@echo "make layouts    the table of conversions between layouts and shards of benchmarks/results"
	@echo "make calls      what a call costs before a byte moves, as in benchmarks/results"
	@echo "make memory     what the books of host memory cost, as in benchmarks/results"
	@echo "make mover      what the mover costs and moves, as in benchmarks/results"
	@echo "make remote     bytes a second to another process, by page size, as in benchmarks/results"
	@echo "make remote-long  200 peers killed and stopped, 10,000 false frames (ARGS=\"--rounds 20\")"
	@echo "make sass       what the CUDA kernels' machine code looks like (needs cuobjdump)"
	@echo "make test       build and run all tests (ARGS=\"-k gather\" goes to pytest)"
	@echo "make simgpu     the GPU tests without a GPU: torch's CUDA build on a stand-in for CUDA (needs nvcc; 5 GB)"
	@echo "make gpu        everything that a GPU must be asked: tests, sanitizer, figures, in nine minutes (needs a GPU)"
	@echo "make gpu-dry-run  every line of that on the stand-in, very small"
	@echo "make sanitize   small copies by every CUDA kernel under compute-sanitizer (needs a GPU; reports in build/sanitizer)"
	@echo "make e2e        vLLM on the CPU offloads its KV cache through kvkernels (ARGS=\"--model my-model/\"; see --help)"
	@echo "make e2e-0.33   the same with a later vLLM"
	@echo "make e2e-long   two ranks, and vLLM's HTTP server with fifty chats at once, on both"
	@echo "make torches    the op tests with the library as it is built on torch 2.10 to 2.14 (30 GB; ARGS=\"--torch 2.10.0\")"
	@echo "make mutants    whether the tests notice when the sources are edited (hours; ARGS=\"--count 20\"; see --help)"
	@echo "make docs       the documentation, in build/docs (ARGS=\"-b dirhtml\" goes to sphinx-build)"
	@echo "make build      only build"
	@echo "make wheel      a wheel for this Python in dist, under the manylinux tag that auditwheel gives it"
	@echo "make lint       ruff, clang-format and mypy"
	@echo "make format     rewrite the files as lint wants them"
	@echo "make audit      check that the op library keeps to torch's stable ABI"
	@echo "make clean      remove what was built; make distclean also removes .venv*"
	@echo "Variables: PYTHON=$(PYTHON)  KVKERNELS_CUDA=$(KVKERNELS_CUDA) (AUTO, ON, OFF)  KVKERNELS_WERROR=$(KVKERNELS_WERROR)"

# Each of Debian's split packages that may be missing gets its own sentence; pip's and CMake's are a page long.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "kvkernels needs Python 3.10 or later: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null \
	  || { echo "$(PYTHON) cannot make virtual environments: apt-get install python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
	  || { echo "$(PYTHON) has no C headers: apt-get install python3-dev" >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null \
	  || { echo "There is no C++ compiler: apt-get install g++" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.requirements: requirements.txt $(VENV)/.created
	$(BIN)/python -m pip install -r $<
	@touch $@

$(VENV)/.requirements-dev: requirements-dev.txt $(VENV)/.requirements
	$(BIN)/python -m pip install -r $<
	@touch $@

# The settings and the list of sources: a changed variable or a removed file rebuilds, which no time stamp would show.
$(VENV)/.settings: always $(VENV)/.created
	@echo "$(KVKERNELS_CUDA) $(KVKERNELS_WERROR) $(SOURCES)" | cmp -s - $@ \
	  || echo "$(KVKERNELS_CUDA) $(KVKERNELS_WERROR) $(SOURCES)" >$@

$(VENV)/.built: $(SOURCES) $(VENV)/.requirements $(VENV)/.settings
	$(BIN)/python -m pip install --no-build-isolation --no-deps -e .
	@touch $@

build: $(VENV)/.built

# torch is the environment's own at run time: auditwheel would pack a second one.
wheel: $(VENV)/.requirements-dev
	rm -rf build/wheel build/lib* build/bdist*
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir build/wheel .
	$(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist build/wheel/*.whl

$(VENV)/.requirements-docs: docs/requirements.txt $(VENV)/.requirements
	$(BIN)/python -m pip install -r $<
	@touch $@

docs: build $(VENV)/.requirements-docs
	$(BIN)/python -m sphinx -W --keep-going -q $(ARGS) docs build/docs
	@echo "build/docs/index.html"

sass: build
	$(BIN)/python benchmarks/sass.py

swap: build
	$(BIN)/python benchmarks/swap.py $(ARGS)

pages: build
	$(BIN)/python benchmarks/pages.py $(ARGS)

calls: build
	$(BIN)/python benchmarks/calls.py $(ARGS)

memory: build $(VENV)/.requirements-dev
	$(BIN)/python benchmarks/memory.py $(ARGS)

mover: build
	$(BIN)/python benchmarks/mover.py $(ARGS)

remote: build $(VENV)/.requirements-dev
	$(BIN)/python benchmarks/remote.py $(ARGS)

# 200 kills and stops of each transport and 10,000 frames of each kind, which the tests do 20 and 400 of. Minutes.
remote-long: build $(VENV)/.requirements-dev
	$(BIN)/python tests/remote_long.py $(ARGS)

layouts: build
	$(BIN)/python benchmarks/layouts.py $(ARGS)

test: build $(VENV)/.requirements-dev
	$(BIN)/pytest -n $(JOBS) --maxprocesses=8 --dist loadfile --no-loadscope-reorder $(ARGS)

# Before the environment, which is the larger part: without nvcc this ends here. The build knows only torch's CPU build.
simgpu-build: $(VENV)/.requirements
	@echo "Building the op library on a shared CUDA runtime, and the stand-in for CUDA"
	cmake --preset simgpu -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
	cmake --build --preset simgpu
	rm -rf $(SIMGPU)/package
	cmake --install $(SIMGPU) --prefix $(SIMGPU)/package/kvkernels
	cp -r $(PACKAGE_SOURCES) $(SIMGPU)/package/kvkernels
	cp -r kvkernels_cli kvkernels_records $(SIMGPU)/package

$(STAND_IN)/.requirements: tests/simgpu/requirements.txt
	@echo "Installing torch's CUDA build into $(STAND_IN): 5 GB"
	rm -rf $(STAND_IN)
	$(PYTHON) -m venv $(STAND_IN)
	$(STAND_IN)/bin/python -m pip install --no-deps -r $<
	@touch $@

# Preloaded, so that torch's libraries find the stand-in's CUDA instead of their own.
ON_STAND_IN = KVKERNELS_STAND_IN=$(SIMGPU) KVKERNELS_FAKE_DEVICES=2 \
  LD_PRELOAD=$(SIMGPU)/libcuda.so.1:$(SIMGPU)/libcudart.so.13:$(SIMGPU)/libkvkernels_drive.so

simgpu: simgpu-build $(STAND_IN)/.requirements
	@echo "Running the GPU tests on the stand-in for CUDA"
	env $(ON_STAND_IN) KVKERNELS_REQUIRE_CUDA=1 PYTHONPATH=$(SIMGPU)/package \
	  $(STAND_IN)/bin/pytest -m cuda -n $(JOBS) --maxprocesses=8 --dist loadfile $(ARGS)

# With a virtual environment; benchmarks/gpu_day.sh alone needs none. The figures are in build/gpu-day/out.
gpu: build $(VENV)/.requirements-dev
	PYTHON=$(CURDIR)/$(BIN)/python bash benchmarks/gpu_day.sh build/gpu-day/out $(ARGS)

# Every line of it, on the stand-in and very small: the library is installed into a package that has none.
gpu-dry-run: simgpu-build $(STAND_IN)/.requirements
	rm -rf $(SIMGPU)/day build/gpu-dry-run
	mkdir -p $(SIMGPU)/day/kvkernels
	cp -r $(PACKAGE_SOURCES) $(SIMGPU)/day/kvkernels
	env $(ON_STAND_IN) PYTHON=$(CURDIR)/$(STAND_IN)/bin/python KVKERNELS_DAY_PACKAGE=$(SIMGPU)/day/kvkernels \
	  KVKERNELS_DAY_BUILD=$(SIMGPU) KVKERNELS_DAY_TESTS="$(DRY_TESTS)" KVKERNELS_DAY_FIGURES="$(DRY_FIGURES)" \
	  KVKERNELS_DAY_CMAKE="-DKVKERNELS_SIMGPU=ON -DCMAKE_CUDA_ARCHITECTURES=80;90;100 -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python" \
	  bash benchmarks/gpu_day.sh build/gpu-dry-run

sanitize: $(VENV)/.requirements
	cmake --preset release -DKVKERNELS_CUDA=ON -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
	cmake --build --preset release --target kvkernels_sanitizer
	bash tests/sanitizer/run.sh build/release/kvkernels_sanitizer build/sanitizer

$(ENGINE)/.requirements: examples/vllm_offload/requirements.txt
	rm -rf $(ENGINE)
	$(PYTHON) -m venv $(ENGINE)
	$(ENGINE)/bin/python -m pip install --no-deps -r $<
	@touch $@

$(LATER)/.requirements: tests/e2e/overlay.py $(ENGINE)/.requirements
	$(ENGINE)/bin/python $< $(ENGINE) $(LATER) $(LATER_VLLM)
	@touch $@

# The library loads there as it is: it knows torch only through its stable ABI.
e2e: build $(ENGINE)/.requirements
	$(ENGINE)/bin/python tests/e2e/run.py $(ARGS)

e2e-0.33: build $(LATER)/.requirements
	$(LATER)/bin/python tests/e2e/run.py $(ARGS)

# Engines of several processes, one after the other, on both.
e2e-long: build $(ENGINE)/.requirements $(LATER)/.requirements
	$(ENGINE)/bin/python tests/e2e/run.py --long --jobs 1 $(ARGS)
	$(LATER)/bin/python tests/e2e/run.py --long --jobs 1 $(ARGS)

torches: build
	$(BIN)/python tests/torches/run.py $(ARGS)

# Edits of csrc/ops are tested under torch's CUDA build, too.
mutants: build $(VENV)/.requirements-dev $(STAND_IN)/.requirements
	$(BIN)/python tests/mutants/run.py $(ARGS)

lint: $(VENV)/.requirements-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	$(BIN)/mypy

format: $(VENV)/.requirements-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

# The pattern is anchored, since UNSTABLE ends in STABLE too.
audit: build $(VENV)/.requirements-dev
	$(BIN)/torch-abi-audit --check torch $(wildcard kvkernels/libkvkernels_ops*.so) | tee $(VENV)/.audit
	@grep -Eq 'Torch ABI: +STABLE' $(VENV)/.audit

clean:
	rm -rf build dist *.egg-info kvkernels/*.so kvkernels/_build.json $(VENV)/.built

distclean: clean
	rm -rf $(VENV) $(STAND_IN) $(ENGINE) $(LATER) $(TORCHES)
