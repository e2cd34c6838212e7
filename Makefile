# make demo   makes .venv, installs what the demonstration needs, and runs it
# make test   adds what lint and the tests need, and runs lint and the whole test suite
# make test-fast   ruff and the quick tests, one or two of every room: under a minute on two quiet cores
# make test-transformers TRANSFORMERS=5.23.0   the tests of what we rely on, on another transformers: a version,
#             `lowest` (of the range in pyproject.toml) or `newest` (on the package index)
# make test-torch TORCH=torch==2.11.0   the same on another torch, in .venv-torch; fetches that torch (gigabytes, where
#             your index has no CPU-only build of it)
# make lock   renews constraints.txt: the newest of everything but torch, which is TORCH
# make sanitize   all kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer
# make tsan   the native code in eight threads under ThreadSanitizer
# make fuzz   100,000 cache files made wrong on purpose, then 10,000 more under AddressSanitizer
# make machine  20,000 random steps on whole caches beside a dense model (a minute on two cores)
# make soak   long runs: decodes, requests, parked caches, the state machine (about an hour; SOAK=0.05 for minutes)
#
# Variables:
#   PYTHON=python3.12     the interpreter .venv is made with (3.11 or newer)
#   LOCK=                 (empty) the newest of everything instead of the versions in constraints.txt
#   TORCH_INDEX=<url>     package index to take torch from, e.g. the one with PyTorch's CPU-only builds
#   TORCH=torch==2.13.0   which torch to install, with LOCK= or for `make lock`
#   SOAK=0.05             fraction of the long runs; their records go to build/soak
#   PYTEST_ARGS="-k demo" more arguments for pytest
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
SOAK ?= 1.0
TORCH_INDEX ?=
LOCK ?= constraints.txt
TORCH ?= torch
TRANSFORMERS ?= lowest
NATIVE := $(wildcard CMakeLists.txt kernels/include/* kernels/cpu/*.cpp kernels/cpu/*.h)
PIP := $(BIN)/pip install $(if $(LOCK),-c $(LOCK))
BUILD_TOOLS := scikit-build-core cmake ninja
# Stamps of their own for locked and newest versions: going from one to the other, and a new lock, start .venv afresh.
KIND := $(if $(LOCK),locked,newest)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile
# What another transformers or torch could break: the contract, the patches, the cache's face.
CONTRACT := tests/patches tests/cache

# Of every room what tells most in little time.
FAST := tests/test_architecture.py tests/test_recipe.py tests/paging tests/plans tests/observers/test_every_kind.py \
	tests/kernels/storage/test_layout.py tests/kernels/storage/test_pack.py tests/cache/test_masks.py \
	tests/cache/test_cache.py tests/cache/test_io_crops.py tests/patches/test_layers.py

.PHONY: demo test test-fast machine lint sanitize tsan fuzz soak install lock test-transformers test-torch contract clean

demo: $(VENV)/.demo-$(KIND)
	$(BIN)/kvcompress demo

test: lint
	$(PYTEST) $(PYTEST_ARGS)

test-fast: $(VENV)/.dev-$(KIND)
	$(BIN)/ruff check .
	$(PYTEST) $(FAST) $(PYTEST_ARGS)

lint: $(VENV)/.dev-$(KIND)
	$(BIN)/ruff check .
	$(BIN)/mypy -p kvcompress_hf

# The package itself is the one in .venv; only transformers is another, put before it on the path.
test-transformers: $(VENV)/.dev-$(KIND)
	$(BIN)/python .ci/transformers.py $(TRANSFORMERS) -- $(CONTRACT) $(PYTEST_ARGS)

test-torch: build/constraints-without-torch.txt
	$(MAKE) contract VENV=.venv-torch LOCK=$<

build/constraints-without-torch.txt: constraints.txt
	mkdir -p build
	grep -vE '^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+)==' $< > $@

contract: $(VENV)/.dev-$(KIND)
	$(PYTEST) $(CONTRACT) $(PYTEST_ARGS)

# The kernel tests on a library with AddressSanitizer and UndefinedBehaviorSanitizer; `make test` runs a part of them.
# Leaks are not looked for: Python's own would drown ours.
sanitize: $(VENV)/.dev-$(KIND)
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/sanitize -DKVC_SANITIZE=ON
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/sanitize --parallel
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 $(BIN)/python tests/kernels/sanitized.py build/sanitize/libkvc_cpu.so \
		tests/kernels -q $(PYTEST_ARGS)

# Forks at work in eight threads, on the native code under ThreadSanitizer. Without OpenMP, whose runtime it cannot see.
TSAN_SOURCES := kernels/cpu/layout.cpp kernels/cpu/dispatch.cpp kernels/cpu/pack.cpp $(wildcard kernels/cpu/attention_*.cpp)
tsan:
	mkdir -p build/tsan
	$(CXX) -std=gnu++17 -O1 -g1 -fno-math-errno -ffp-contract=off -fsanitize=thread -pthread -Wall -Wno-psabi \
		-Wno-unknown-pragmas -DKVC_ISA=scalar -DKVC_ISA_scalar=1 -DKVC_HAS_scalar=1 -Ikernels/include -Ikernels/cpu \
		$(TSAN_SOURCES) tests/native/threads.cpp -o build/tsan/threads
	build/tsan/threads 100
	@# Would a race be seen? All threads write to the same pages here, for which ThreadSanitizer ends with status 66.
	build/tsan/threads 2 race >build/tsan/race.txt 2>&1; test $$? -eq 66

# What came of it is kept in benchmarks/results/fuzz_files.json; a failure names its number, to be run again by itself.
fuzz: $(VENV)/.dev-$(KIND)
	$(BIN)/python tests/fuzz/files.py --count 100000 --seed 0 --output benchmarks/results/fuzz_files.json
	$(BIN)/python tests/fuzz/files.py --count 10000 --seed 1 --sanitize --output benchmarks/results/fuzz_files.json

machine: $(VENV)/.dev-$(KIND)
	mkdir -p build
	OMP_NUM_THREADS=1 $(BIN)/python tests/machine/run.py --steps 20000 --workers 2 --output build/machine.json

soak: $(VENV)/.dev-$(KIND)
	mkdir -p build/soak
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak/soak.py --scale $(SOAK) --output build/soak/soak.json
	OMP_NUM_THREADS=1 $(BIN)/python tests/machine/run.py \
		--steps $$(awk 'BEGIN { printf "%d", 400000 * $(SOAK) }') --workers 2 --output build/soak/machine.json

install: $(VENV)/.dev-$(KIND)

# One file for every supported Python, with and without a GPU: torch==2.13.0 is met by 2.13.0+cpu as well, and what only
# a CUDA build of torch asks for stands there too.
lock: $(VENV)/.demo-$(KIND)
	$(BIN)/pip install uv
	@echo '$(if $(filter torch,$(TORCH)),torch==2.13.0,$(TORCH))' | $(BIN)/uv pip compile --universal --upgrade \
		--python-version 3.11 --extra models --extra plot --extra build --extra nvrtc --extra dev --constraint - --no-annotate \
		--custom-compile-command 'make lock' --output-file constraints.txt pyproject.toml

# torch first and by itself: it decides which build (CPU or GPU) everything after it uses.
$(VENV)/.torch-$(KIND): $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer is needed: make PYTHON=python3.12 ...' >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	@touch $@

# Again when the native code or the package's metadata change; Python files are used in place.
$(VENV)/.demo-$(KIND): $(VENV)/.torch-$(KIND) pyproject.toml $(NATIVE)
	$(PIP) $(BUILD_TOOLS)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation -e '.[models,plot,build]'
	@touch $@

$(VENV)/.dev-$(KIND): $(VENV)/.demo-$(KIND)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation -e '.[models,plot,build,dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist demo_output .pytest_cache .mypy_cache .ruff_cache .hypothesis
