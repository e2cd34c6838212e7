# make demo   makes .venv, installs, runs the demonstration
# make test   the same .venv, lint and the whole test suite
# make sanitize   all kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer (needs cmake)
# make fuzz   100,000 cache files made wrong on purpose, then 10,000 more under AddressSanitizer (needs cmake)
#
# Variables:
#   PYTHON=python3.12     the interpreter .venv is made with (3.10 or newer)
#   TORCH_INDEX=<url>     package index to take torch from, e.g. the one with PyTorch's CPU-only builds
#   TORCH=torch==2.13.0   which torch to install
#   PYTEST_ARGS="-k demo" more arguments for pytest
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
TORCH_INDEX ?=
# A machine with a GPU gets the ordinary torch, any other the version tested on CPU.
TORCH ?= $(shell if nvidia-smi -L >/dev/null 2>&1; then echo 'torch>=2.11'; else echo 'torch==2.13.0'; fi)
NATIVE := $(wildcard CMakeLists.txt kernels/CMakeLists.txt kernels/include/* kernels/cpu/*)

.PHONY: demo test lint sanitize fuzz install clean

demo: $(VENV)/.installed
	$(BIN)/kvcompress demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy -p kvcompress_hf

# The kernel tests on a library with AddressSanitizer and UndefinedBehaviorSanitizer; `make test` runs a part of them.
# Leaks are not looked for: Python's own would drown ours.
sanitize: $(VENV)/.installed
	cmake -S . -B build/sanitize -DKVC_SANITIZE=ON
	cmake --build build/sanitize --parallel
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 $(BIN)/python tests/kernels/sanitized.py build/sanitize/libkvc_cpu.so \
		tests/kernels -q $(PYTEST_ARGS)

# What came of it is kept in benchmarks/results/fuzz_files.json; a failure names its number, to be run again by itself.
fuzz: $(VENV)/.installed
	$(BIN)/python tests/fuzz/files.py --count 100000 --seed 0 --output benchmarks/results/fuzz_files.json
	$(BIN)/python tests/fuzz/files.py --count 10000 --seed 1 --sanitize --output benchmarks/results/fuzz_files.json

install: $(VENV)/.installed

# torch first and by itself: it decides which build (CPU or GPU) everything after it uses.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'Python 3.10 or newer is needed: make PYTHON=python3.12 ...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	@touch $@

# Runs again when the native code or the package's metadata change; Python files are used in place.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml $(NATIVE)
	$(BIN)/pip install -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist demo_output .pytest_cache .mypy_cache .ruff_cache .hypothesis
