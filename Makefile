# Every target does its own set-up, in .venv and build/; needed are Python with venv, and a C++ compiler.
#   make demo        a small training run, explained
#   make test        all tests              make lint      style, types, stubs
#   make bench       speed, five minutes    make bench-full all sizes, threads, and goals
#   make gpu-check   what only a GPU can show
#   make exhaustive  all 2^32 inputs        make sanitize  address and undefined-behaviour sanitizers
#   make clang       native tests by clang       make aarch64   and for aarch64, under qemu
#   make shim        CUDA's kernels on the CPU   make shim-races  and their races
#   make torches     one wheel under several torch versions   make pythons  a wheel for each Python
#   make integrations   the training loops of other libraries
#   make cuda-all    kernels for every architecture  make cuda-wheels  by nvcc from the package index
#   make instructions   the cost of small calls against its budget, under valgrind
#   make full        all checks a CPU can do
# CUDAARCHS='80;90-real' names the GPUs to build kernels for; without it, those of this machine, or 9.0.
PYTHON ?= python3
CLANG ?= $(firstword $(foreach v,22 21 20 19 18 17 16 15,$(shell command -v clang++-$v)) clang++)
export PATH := $(CURDIR)/.venv/bin:$(PATH)
ifndef CUDAARCHS
export CUDAARCHS := $(if $(shell nvidia-smi -L 2>/dev/null),,90-real)
endif

TOOLS := .venv/tools.stamp
PACKAGE := .venv/package.stamp
SOURCES := CMakeLists.txt pyproject.toml LICENSE $(shell find cmake csrc python -type f -not -name '*.pyc' -not -name '*.so')
CXX_FILES := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
CONFIGURE := cmake -S . -G Ninja -DMBKERN_PYTHON=OFF -DMBKERN_CUDA=OFF -DMBKERN_NATIVE_TESTS=ON
# Links the CPU's tiers that $(PACKAGE) has compiled: two thirds of what the shim would compile.
BUILT := import glob, os, sys; \
  print(*map(os.path.abspath, glob.glob("build/cp{}{}-*".format(*sys.version_info))[:1]))
SHIM_CONFIGURE := $(CONFIGURE) -B build/shim/native -DMBKERN_CUDA_SHIM=ON \
  -DMBKERN_CPU_OBJECTS="$$(python -c '$(BUILT)')"

.PHONY: demo test slow bench bench-full gpu-check lint full instructions exhaustive sanitize shim shim-native shim-races clang aarch64 torches pythons integrations cuda-all cuda-wheels clean
.DELETE_ON_ERROR:

$(TOOLS): constraints.txt
	$(PYTHON) -m venv .venv
	python -m pip install -q -c constraints.txt cmake ninja
	touch $@

$(PACKAGE): $(TOOLS) $(SOURCES)
	python -m pip install -q -c constraints.txt '.[test,lint,bench,demo]'
	touch $@

demo: $(PACKAGE)
	python examples/demo.py

# Most tests keep one core busy.
TEST_JOBS ?= 2
test: $(PACKAGE)
	python -m pytest tests -q -m 'not slow' -n $(TEST_JOBS) --dist worksteal

slow: $(PACKAGE)
	python -m pytest tests -q -m slow

bench: $(PACKAGE)
	python -m mbkern bench --short

bench-full: $(PACKAGE)
	python -m mbkern bench all --compile --output build/bench.jsonl
	python bench/run.py

# STAGE=build|bits|test|sanitize|bench: one of them. Runs offline, in .venv, or without one in the
# Python at hand if that has torch.
HAS_TORCH := import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)
gpu-check:
	@test -d .venv || $(PYTHON) -c '$(HAS_TORCH)' || $(MAKE) $(PACKAGE)
	@$$(test -d .venv && echo python || echo $(PYTHON)) bench/gpu_check.py $(addprefix --stage ,$(STAGE))

lint: $(PACKAGE)
	ruff check .
	ruff format --check .
	mypy --strict python/mbkern
	clang-format --dry-run -Werror $(CXX_FILES)
	python -m mypy.stubtest mbkern._C

full: lint instructions test slow sanitize shim clang aarch64 torches pythons integrations cuda-all cuda-wheels exhaustive

exhaustive: $(TOOLS)
	$(CONFIGURE) -B build/native
	cmake --build build/native
	build/native/exhaustive

# The extension runs in a Python that is not instrumented, so the runtimes are loaded before it; all
# tests run but those of the binary itself, of compilers (which cannot run with them), of a GPU, and
# the slow ones.
sanitize: export ASAN_OPTIONS = detect_leaks=0
sanitize: export UBSAN_OPTIONS = halt_on_error=1:print_stacktrace=1
sanitize: $(PACKAGE)
	CXX=$(CXX) $(CONFIGURE) -B build/sanitize/native -DMBKERN_SANITIZE=ON
	cmake --build build/sanitize/native
	build/sanitize/native/core_test
	build/sanitize/native/shim_test
	CXX=$(CXX) MBKERN_CUDA=OFF python -m pip install -q --no-deps --upgrade . \
	  --target build/sanitize/site --config-settings=build-dir=build/sanitize/module \
	  --config-settings=cmake.define.MBKERN_SANITIZE=ON --config-settings=install.strip=false
	PYTHONPATH=build/sanitize/site \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	python -m pytest tests -q --ignore=tests/test_binary.py \
	  --ignore=tests/test_machine_code.py -m 'not gpu and not slow'

# CUDA's kernels on the CPU, their threads in several orders.
SHIM_ORDERS ?= ascending descending random:1
SHIM_TESTS ?= tests/test_selftest.py tests/test_losses.py tests/test_cuda.py tests/test_accumulator_device.py \
  tests/test_gpu_head.py tests/test_linear_device.py
shim-native: $(PACKAGE)
	$(SHIM_CONFIGURE)
	cmake --build build/shim/native --target shim_test core_test
	build/shim/native/shim_test
	MBKERN_SHIM_ORDER=descending build/shim/native/core_test --quick

# Instructions of small fixed calls, under valgrind. make instructions FLAGS=--update renews the budgets.
instructions: $(PACKAGE)
	$(SHIM_CONFIGURE)
	cmake --build build/shim/native --target instructions
	$(PYTHON) bench/instructions.py build/shim/native/instructions $(FLAGS)

shim: $(PACKAGE) shim-native
	MBKERN_CUDA=OFF python -m pip install -q --no-deps --upgrade . --target build/shim/site \
	  --config-settings=build-dir=build/shim/module \
	  --config-settings=cmake.define.MBKERN_CUDA_SHIM=ON \
	  --config-settings=cmake.define.MBKERN_CPU_OBJECTS="$$(python -c '$(BUILT)')"
	MBKERN_SHIM_COMPILED_FOR=8.0 build/shim/native/core_test --quick
	set -e; for order in $(SHIM_ORDERS); do export MBKERN_SHIM_ORDER=$$order; \
	  build/shim/native/core_test --quick; \
	  PYTHONPATH=build/shim/site python -m pytest -q $(SHIM_TESTS) -m 'not slow'; \
	done

# The same under the thread sanitizer, which knows about 8000 threads: a small device.
shim-races: $(TOOLS)
	$(CONFIGURE) -B build/shim/races -DMBKERN_CUDA_SHIM=ON -DMBKERN_SHIM_RACES=ON
	cmake --build build/shim/races --target shim_test core_test
	build/shim/races/shim_test 2> build/shim/races/planted.txt
	MBKERN_SHIM_MULTIPROCESSORS=1 build/shim/races/core_test --quick

clang: $(TOOLS)
	CXX=$(CLANG) $(CONFIGURE) -B build/clang
	cmake --build build/clang
	build/clang/core_test
	build/clang/shim_test

# Needs a cross-compiler and an emulator: g++-aarch64-linux-gnu and qemu-user on Debian.
AARCH64 := aarch64-linux-gnu
aarch64: $(TOOLS)
	$(CONFIGURE) -B build/aarch64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=$(AARCH64)-g++
	cmake --build build/aarch64
	qemu-aarch64 -L /usr/$(AARCH64) build/aarch64/core_test --quick
	qemu-aarch64 -L /usr/$(AARCH64) build/aarch64/shim_test

# The oldest and the newest torch, each in an environment of its own, with the wheel that .venv has.
TORCHES ?= 2.6.0 2.14.1
BOUNDARY := $(patsubst %,tests/test_%.py,settings operators autograd inplace grad_scale refusals losses \
  patched patched_calls patched_compile accumulator_scaler grad_accumulator accumulator_failures \
  accumulator_ranks accumulator_agreement accumulator_state operands formulas tensor_options \
  options_of_losses not_tensors_everywhere not_numbers ways_random linear_random linear_refusals)
torches: $(PACKAGE)
	python -m pip wheel -q --no-deps . -w build/wheel
	set -e; for version in $(TORCHES); do \
	  $(PYTHON) -m venv build/torch-$$version; \
	  build/torch-$$version/bin/python -m pip install -q torch==$$version pytest hypothesis expecttest; \
	  build/torch-$$version/bin/python -m pip install -q --force-reinstall --no-deps build/wheel/*.whl; \
	  build/torch-$$version/bin/python -m pip install -q numpy; \
	  build/torch-$$version/bin/python -m mbkern selftest > build/torch-$$version/selftest.txt; \
	  tail -n 1 build/torch-$$version/selftest.txt; \
	  build/torch-$$version/bin/python -m pytest -q $(BOUNDARY) -m 'not slow'; \
	done

# Every other Python that runs here, with a wheel and an environment of its own, and the torch of .venv.
PYTHONS ?= $(foreach p,$(addprefix python3.,10 12 13 14),$(shell $p -c '' 2>/dev/null && echo $p))
pythons: $(TOOLS)
	@test -n '$(strip $(PYTHONS))' || echo 'NOT CHECKED: no other Python here; PYTHONS names some'
	set -e; for python in $(PYTHONS); do \
	  home=build/python-$$($$python -c 'import platform; print(platform.python_version())'); \
	  $$python -m venv $$home; \
	  MBKERN_CUDA=OFF $$home/bin/python -m pip wheel -q --no-deps . -w $$home; \
	  $$home/bin/python -m pip install -q -c constraints.txt torch numpy pytest hypothesis expecttest; \
	  $$home/bin/python -m pip install -q --force-reinstall --no-deps $$home/*.whl; \
	  $$home/bin/python -m mbkern selftest > $$home/selftest.txt; \
	  tail -n 1 $$home/selftest.txt; \
	  $$home/bin/python -m pytest -q $(BOUNDARY) -m 'not slow'; \
	done

# Loops of Hugging Face's Trainer, Accelerate and Lightning, in an environment of their own.
integrations: $(PACKAGE)
	python -m pip wheel -q --no-deps . -w build/wheel
	$(PYTHON) -m venv build/integrations
	build/integrations/bin/python -m pip install -q $$(.venv/bin/python -c \
	  'import torch; print("torch==" + torch.__version__.split("+")[0])') \
	  numpy pytest hypothesis expecttest transformers accelerate lightning
	build/integrations/bin/python -m pip install -q --force-reinstall --no-deps build/wheel/*.whl
	build/integrations/bin/python -m pytest -q -W default tests/test_integrations.py \
	  tests/test_micro_batches_encoding.py

# The kernels for all architectures, and PTX of the first and of the last for what comes between and
# after; then their machine code. make cuda-all FLAGS=--write renews the table of registers.
ALL_ARCHS := 80;86-real;89-real;90-real;100-real;120
CUDA_OBJECTS := cmake -S . -G Ninja -DMBKERN_PYTHON=OFF -DMBKERN_CUDA=ON
cuda-all: $(PACKAGE)
	CUDAARCHS='$(ALL_ARCHS)' $(CUDA_OBJECTS) -B build/cuda-all
	cmake --build build/cuda-all --target mbkern_cuda
	python tests/machine_code.py $(FLAGS) $$(find build/cuda-all -name '*.cu.o')

# By the compiler that pip brings, with no other on the path.
cuda-wheels: export PATH := $(CURDIR)/.venv/bin:/usr/bin:/bin
cuda-wheels: $(PACKAGE)
	$(PYTHON) -m venv build/nvcc
	build/nvcc/bin/python -m pip install -q -r cmake/nvcc-wheels.txt
	CUDACXX="$$(build/nvcc/bin/python cmake/wheel_nvcc.py)" CUDAARCHS=90-real \
	  $(CUDA_OBJECTS) -B build/cuda-wheels
	cmake --build build/cuda-wheels --target mbkern_cuda
	python tests/machine_code.py $$(find build/cuda-wheels -name '*.cu.o')

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache $(PACKAGE)
