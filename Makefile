# Every target works on a fresh machine with git, python3, make and a C++ compiler, and installs what it needs into VENV.
#
#   make demo TORCH="torch==2.13.0"                                                  another torch
#   make demo TORCH="torch --index-url https://download.pytorch.org/whl/cpu"         the smaller one without CUDA

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The public BEiT-3, which tests compare with. --no-deps: what these pin is older than what they run with.
ORACLES := torchscale==0.3.0 fairscale==0.4.13 beit3-gml
# A change of any of these installs again; other Python files are used where they lie.
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt beit3_fast/_version.py $(shell find csrc -type f)
CXX_SOURCES := $(shell find bench csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest test-oldest-quick headers sanitize gpu-check gpu-report budget lint format build clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## the drop-in model against reference PyTorch on real photos; writes demo.png
	$(BIN)/beit3-fast demo

test: $(VENV)/.test ## build, and run every test; PYTEST_ARGS="-k name" selects
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS) tests/kernels

# The oldest torch that is promised is 2.10. 2.11 stands for it in tests: both come with Triton 3.6.0, so the kernels are
# compiled alike, and 2.11 is of CUDA 13 as the current torch is, where 2.10 would have all of CUDA 12 downloaded. That
# csrc/ needs nothing newer than 2.10 is what `headers` checks. Libraries that were built with another torch are kept: that
# they load is promised too, and that they compile there is what tests/test_build.py sees.
OLDEST_VENV := .venv-oldest
OLDEST := VENV=$(OLDEST_VENV) TORCH="torch==2.11.0 triton==3.6.0 torchvision==0.26.0"
OLDEST_TESTS := tests/kernels tests/ops tests/models
# What looks at code that the old Triton or the old torch makes of ours, and the heads beside the public ones.
OLDEST_QUICK := sm_90 or tf32 or fence or opcheck or compiles or tiny

test-oldest: ## what the oldest PyTorch and Triton that are promised can break; PYTHON=python3.12 selects
	$(MAKE) $(OLDEST) $(OLDEST_VENV)/.test headers
	OMP_NUM_THREADS=1 $(OLDEST_VENV)/bin/python -m pytest -n 2 $(PYTEST_ARGS) $(OLDEST_TESTS) tests/gpu \
		tests/bench/test_simulate.py tests/bench/test_static.py tests/test_build.py

test-oldest-quick: ## the minutes of test-oldest that find most
	$(MAKE) $(OLDEST) $(OLDEST_VENV)/.test headers
	OMP_NUM_THREADS=1 $(OLDEST_VENV)/bin/python -m pytest -n 2 $(PYTEST_ARGS) $(OLDEST_TESTS) -k "$(OLDEST_QUICK)"

# The headers of the stable ABI are the same for every platform, and macOS has the smallest package (80 MB) of torch.
# Of csrc/ only the .cpp files see torch.
TORCH_HEADERS := build/torch-2.10.0

headers: $(TORCH_HEADERS) ## csrc/ against the headers of torch 2.10
	find csrc -name '*.cpp' | xargs -P 2 -n 1 $(CXX) -std=c++20 -fsyntax-only -Wall -Wextra -Werror -Icsrc \
		-isystem $(TORCH_HEADERS)/torch/include -DTORCH_TARGET_VERSION=0x020a000000000000 -DUSE_CUDA

$(TORCH_HEADERS): | $(VENV)/.torch
	rm -rf $@.part
	$(PIP) download --quiet --no-deps --only-binary=:all: --python-version 3.12 --platform macosx_11_0_arm64 \
		--dest $@.part torch==2.10.0
	cd $@.part && $(abspath $(BIN))/python -c 'import glob, zipfile; \
		wheel = zipfile.ZipFile(glob.glob("*.whl")[0]); \
		wheel.extractall(members=[name for name in wheel.namelist() if name.startswith("torch/include/")])'
	rm $@.part/*.whl
	mv $@.part $@

sanitize: $(VENV)/.test ## the CPU kernels under the address and undefined-behaviour sanitizers
	$(BIN)/python -m pytest -rs $(PYTEST_ARGS) tests/csrc/test_sanitizers.py

# Each call once: under the tools a second becomes minutes. Without PyTorch's cache of memory every tensor has bounds of
# its own; a graph cannot be captured like that.
SANITIZED := tests/gpu/test_ops.py tests/gpu/test_layer_norm.py -k "base-bf16-700 or masked_attention or decode_attention \
	or route_tokens or (every_width and bfloat16 and 1000)"

gpu-check: ## on a machine with a GPU: every test, then the kernels under compute-sanitizer
	@if ! nvidia-smi -L > /dev/null 2>&1; then \
		echo "gpu-check: there is no GPU (nvidia-smi lists none), so nothing was checked"; \
	elif ! command -v compute-sanitizer > /dev/null; then \
		$(MAKE) test && echo "gpu-check: compute-sanitizer is not on PATH, so memory and races were not checked"; \
	else \
		$(MAKE) test && for tool in memcheck racecheck synccheck; do \
			GPU_TESTS_WARM=0 PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --target-processes all --error-exitcode 1 \
				$(BIN)/python -m pytest -q $(SANITIZED) || exit 1; \
		done; \
	fi

OUT ?= build/gpu
BUDGET ?= 430
gpu-report: ## on a machine with a GPU and PyTorch, nothing installed: everything measured into OUT within BUDGET seconds
	mkdir -p build/site/beit3_fast
	ln -sfn $(CURDIR)/beit3_fast/* $(CURDIR)/kernels $(CURDIR)/bench build/site/beit3_fast/
	cd build/site && PYTHONPATH=$(CURDIR)/build/site$${PYTHONPATH:+:$$PYTHONPATH} \
		$(if $(findstring /,$(PYTHON)),$(abspath $(PYTHON)),$(PYTHON)) -m beit3_fast.bench.gpu --out $(abspath $(OUT)) --budget $(BUDGET) $(if $(DRY),--dry-run)

budget: $(VENV)/.test ## the GPU kernels of every architecture: registers, spills and the like against their budgets
	$(BIN)/beit3-fast bench static

lint: $(VENV)/.dev ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(VENV)/.dev ## mend the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

build: $(VENV)/.torch ## a wheel, in dist/
	$(PIP) wheel . --no-deps --no-build-isolation --wheel-dir dist

clean: ## remove what was built; virtual environments stay
	rm -rf build dist beit3_fast/lib *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f $(VENV)/.demo $(VENV)/.test $(VENV)/.dev $(OLDEST_VENV)/.test
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -not -path './$(OLDEST_VENV)/*' -prune -exec rm -rf {} +

# ---- the virtual environment, step by step; each file says that its step is done ----

$(VENV)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip "setuptools>=77" "cmake>=3.24" ninja
	$(PIP) install $(TORCH)
	touch $@

# torch is there already, so the project builds against it: an isolated build would download a second one.
$(VENV)/.demo: $(VENV)/.torch $(BUILD_INPUTS)
	$(PIP) install --quiet --no-build-isolation --editable '.[bench]'
	$(report_build)
	touch $@

$(VENV)/.test: $(VENV)/.torch $(BUILD_INPUTS)
	$(PIP) install --quiet --no-warn-conflicts $(TORCH) torchvision timm
	$(PIP) install --quiet --no-warn-conflicts --no-build-isolation --editable '.[bench,test]'
	$(PIP) install --quiet --no-deps $(ORACLES)
	$(report_build)
	touch $@

$(VENV)/.dev: $(VENV)/.torch $(BUILD_INPUTS)
	$(PIP) install --quiet --no-build-isolation --editable '.[dev]'
	touch $@

# pip shows nothing of a build that went well, and what was left out must not pass unseen.
report_build = @$(BIN)/python -c 'import json; \
	[print("  {:5}{}{}".format(part, "" if it["built"] else "skipped: ", it["reason"])) \
	for part, it in json.load(open("beit3_fast/lib/build.json")).items()]'
