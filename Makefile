# `make test` and `make demo` set everything up on a machine with Python >= 3.10 and a C++ compiler: .venv with the pinned
# packages of requirements.txt, and the extension, built in place. `PYTHON=...` names an interpreter that holds torch
# already; then nothing is installed.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
export HF_HUB_OFFLINE := 1
CORES := $(shell env -u OMP_NUM_THREADS nproc)
export MAX_JOBS ?= $(CORES)

ifdef PYTHON
PY := $(PYTHON)
PACKAGES :=
else
PY := .venv/bin/python
PACKAGES := .venv/.installed
endif
SOURCES := setup.py $(shell find csrc -type f)
BUILT := build/.built-$(shell $(if $(PYTHON),$(PYTHON),python3) -c 'import sys; print(sys.implementation.cache_tag)')

.PHONY: build test test-fast demo bench sanitize fuzz mutants gpu-test gpu-sanitize gpu-bench docs lint format clean
build: $(BUILT)

.venv/.installed: requirements.txt
	python3 -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or later is needed, python3 is " + sys.version.split()[0])'
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(BUILT): $(SOURCES) $(PACKAGES)
	$(PY) setup.py --quiet build_ext --inplace
	mkdir -p build && touch $@

# On every core, a file on one, in the order of python_tests/conftest.py; an interpreter named by PYTHON need not have
# pytest-xdist.
EVERY_CORE := $(if $(PACKAGES),-n $(CORES) --dist loadfile --no-loadscope-reorder)
test: build
	OMP_NUM_THREADS=1 $(PY) -m pytest python_tests -q $(EVERY_CORE) $(ARGS)

# What to run while editing: the ops, the index, the losses and the checks of arguments.
test-fast: build
	OMP_NUM_THREADS=1 $(PY) -m pytest python_tests -q -m "not slow and not gpu and not browser and not ray" \
	  $(EVERY_CORE) $(ARGS)

# DATA=../shared/data/instruments runs it on a real catalogue.
demo: build
	$(PY) -m demo $(if $(DATA),--data $(DATA)) $(ARGS)

# Hours; it says how many at the start, and stopped it goes on where it was. ARGS="--only trie" measures one part again.
bench: build
	$(PY) -m benchmarks $(ARGS)

# C++ tests and operators under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer; needs cmake.
sanitize: build
	$(PY) -m cpp_tests.sanitize $(ARGS)

# Ten minutes a target: FUZZ_SECONDS=3600 make fuzz ARGS="sid_files index_file". Needs clang++ with libFuzzer.
FUZZ_SECONDS ?= 600
fuzz: build $(if $(PACKAGES),.venv/.fuzz)
	$(PY) -m fuzz --seconds $(FUZZ_SECONDS) $(ARGS)

.venv/.fuzz: fuzz/requirements.txt .venv/.installed
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r fuzz/requirements.txt
	touch $@

# Whether the tests find deliberate faults in the kernels and their Python; stopped it goes on where it was.
mutants: build
	$(PY) -m mutants $(ARGS)

# On a machine with an NVIDIA GPU, nvcc and a torch with CUDA: TORCH_CUDA_ARCH_LIST=9.0 make gpu-test PYTHON=python3
gpu-test: build
	$(PY) -m python_tests.gpu.gpu_suite $(ARGS)

gpu-sanitize: build
	$(PY) -m python_tests.gpu.gpu_sanitize $(ARGS)

gpu-bench: build
	$(PY) -m benchmarks.gpu.kernels
	$(PY) -m benchmarks.gpu.bench $(ARGS)

# The site, into build/site. It is built from the sources' text: the extension need not be.
docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --quiet --strict

.venv-docs/.installed: docs/requirements.txt
	python3 -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	touch $@

lint: $(PACKAGES)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(dir $(PY))clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.inl' '*.cu' '*.cuh')
	$(PY) -m mypy raddpo_ext

format: $(PACKAGES)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(dir $(PY))clang-format -i $$(git ls-files '*.cpp' '*.h' '*.inl' '*.cu' '*.cuh')

clean:
	rm -rf build raddpo_ext/*.so
