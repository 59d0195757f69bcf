# What people and CI both call. Everything lives in .venv; nothing else on the machine is touched.
# Written for GNU make 3.81 and BSD tools too, which macOS has.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

# A reference op must not be measured, or tested, for the kernel that is missing: here a fallback is an error.
STRICT := UPS_FAST_STRICT=1
BENCHMARKS := benchmarks --record --benchmark-only --benchmark-disable-gc --benchmark-quiet -q -s

.PHONY: setup train test test-slow bench lint wheel wheel-check gpu-check clean

# The extension is built without build isolation, against the torch that will load it.
setup: .venv/ready
.venv/ready: pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("needs Python 3.10 or newer, such as: make setup PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing torch and the rest, compiling the kernels: some minutes"
	$(BIN)/python -m pip install --quiet "torch>=2.11" torchvision "setuptools>=70" pybind11 ninja
	$(BIN)/python -m pip install --quiet --no-build-isolation --config-settings editable_mode=compat --editable ".[train,dev]"
	$(BIN)/python -c "import ups_fast; [print(f'{k}: {v}') for k, v in ups_fast.backend().items()]"
	touch $@

train: setup
	$(BIN)/python -m ups_fast.train configs/digits.yaml

# A process for each core, of one thread each. A file of tests stays in one process, as its fixtures are expensive.
PARALLEL := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test: setup
	$(PARALLEL) -m "not slow"

test-slow: setup
	$(PARALLEL) -m slow

bench: setup
	$(STRICT) $(BIN)/python -m pytest $(BENCHMARKS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell git ls-files "*.h" "*.cpp" "*.inl" "*.cu" "*.cuh")

# A wheel for the Python of .venv, in dist/. It serves every torch from that of pyproject.toml on: the kernels use only
# torch's stable ABI. Without nvcc, or with UPS_FAST_CUDA=0, it has the CPU kernels alone. What is left in build/lib of
# an earlier tree would go into it. auditwheel finds which manylinux it is; macOS has none.
ARCHS := 8.0;9.0;10.0;12.0+PTX
wheel: setup
	rm -rf build/lib* build/bdist* build/wheel
	TORCH_CUDA_ARCH_LIST="$(ARCHS)" $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation -w build/wheel .
	mkdir -p dist
	if test "$$(uname)" = Linux; then \
	  $(BIN)/auditwheel repair --strip --exclude "libtorch*.so" --exclude libc10.so -w dist build/wheel/*.whl; \
	else cp build/wheel/*.whl dist; fi

# The wheel in two new environments, with the oldest torch and the newest: gigabytes to download, minutes to run.
wheel-check: wheel
	.ci/wheel-check $(BIN)/python

# On a machine with a GPU, in whatever environment is active: no network, no virtual environment, and of the trainer's
# packages only torchvision. Kernels, their tests (compute-sanitizer among them), then the benchmarks and their record.
# Tests in several processes, where pytest-xdist is there: make gpu-check PROCESSES="-n 8"
gpu-check:
	$(PYTHON) -c "import sys, torch; torch.cuda.is_available() or sys.exit('gpu-check needs a GPU that torch can see')"
	UPS_FAST_CUDA=1 $(PYTHON) setup.py build_ext --inplace
	$(STRICT) $(PYTHON) -m pytest -m gpu -p no:cacheprovider --durations=10 $(PROCESSES) $(shell grep -l "mark\.gpu" tests/test_*.py)
	$(STRICT) $(PYTHON) -m pytest $(BENCHMARKS) -p no:cacheprovider --durations=10

clean:
	rm -rf .venv build dist ups_fast/*.so *.egg-info
