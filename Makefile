# Two commands for everybody: `make demo` and `make test`. They need Python >= 3.11 and a C++ compiler,
# and make their own virtual environment. `make gpu` is for a machine with a GPU and torch already there.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f)
# torch and the triton that belongs to it; any torch >= 2.11 with triton >= 3.6 works as well.
TORCH := torch==2.13.0 triton==3.7.1
BUILD_TOOLS := setuptools wheel ninja pybind11 numpy
SANITIZED := build/sanitized

.PHONY: demo test lint bench paper gpu sanitize doctor clean

demo: $(VENV)/.built
	$(BIN)/bpfree demo

test: lint
	$(BIN)/python -m pytest tests -q

lint: $(VENV)/.built
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

doctor: $(VENV)/.built
	$(BIN)/python -m bpfree_kernels

# Each family in a process of its own: what one leaves behind in the allocator changes the others' times.
bench: $(VENV)/.built
	for family in drtp pepita local_conv ekdaa invertible_conv memory; do \
	  $(BIN)/python -m pytest benchmarks/bench_$$family.py -q \
	    --benchmark-columns=median,iqr,rounds --results docs/results/cpu-$$family || exit 1; \
	done

# The papers' accuracy figures; BPFREE_DATA or the download cache has the data sets.
paper: $(VENV)/.built
	for table in drtp-mnist pepita-mnist pepita-cifar pepita-cifar-full pepita-mnist-conv \
	  urfb-cifar ekdaa-fashion ekdaa-signum gait-cifar-shallow gait-cifar-deep; do \
	  $(BIN)/python benchmarks/paper.py $$table || exit 1; \
	done

$(VENV)/.torch: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "bpfree-kernels needs Python 3.11 or later; set PYTHON=python3.x"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(TORCH) $(BUILD_TOOLS)
	touch $@

$(VENV)/.built: $(VENV)/.torch setup.py pyproject.toml $(SOURCES)
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[train,test,bench]'
	touch $@

# The machine's own Python, torch and triton; no network. Writes docs/results/gpu-*.{md,json}.
gpu:
	$(PYTHON) setup.py -q build_ext --inplace
	PYTHONPATH=.:python_api $(PYTHON) benchmarks/gpu_run.py

# The CPU kernels under AddressSanitizer and UBSan, on every instruction set that this machine has.
sanitize: $(VENV)/.built
	BPFREE_SANITIZE=address,undefined $(BIN)/python -m pip install -q --no-build-isolation \
	  --no-deps --upgrade --target $(SANITIZED) .
	for isa in baseline avx2 avx512; do \
	  BPFREE_CPU_ISA=$$isa PYTHONPATH=$(SANITIZED) \
	  LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 BPFREE_DISABLE=triton \
	  $(BIN)/pytest tests/kernels -q -x -k "cpp and not compile" -p no:cacheprovider || exit 1; \
	done

clean:
	rm -rf build dist *.egg-info bpfree_kernels/lib bpfree_kernels/_host*.so
