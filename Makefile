# The one door for commands. `make demo` and `make test` install what they need into .venv first.
PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
DEMO_FLAGS ?=
SOURCES := $(shell find csrc -type f) CMakeLists.txt pyproject.toml
FORMATTED := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
OTHER_TORCH ?= torch==2.13.0

.PHONY: install demo test lint fuzz evidence evidence-quick emulate gpu-resources gpu-check bench bench-smoke bench-report bench-table sanitize wheel wheel-proof clean

install: $(VENV)/.built

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)" numpy scikit-build-core pybind11 cmake ninja
	touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install --quiet --no-build-isolation -e ".[train,timm,dev]"
	touch $@

# The main job on a small synthetic study: recordings, preparation, all networks, report.
demo: install
	$(BIN)/pycdgkd demo --out $(OUT) $(DEMO_FLAGS)

test: install bench-smoke
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

# Damaged files for every reader of files from outside; about a minute on two cores.
INPUTS ?= 20000
fuzz: install
	$(BIN)/python tests/fuzz/fuzz.py $(INPUTS)

# The controlled study of the paper's claims on features, then on recordings; `evidence` is what
# benchmarks/evidence holds. Stopped, it goes on with the second line alone.
evidence: install
	rm -f benchmarks/evidence/*.jsonl
	$(BIN)/pycdgkd experiment controlled --out benchmarks/evidence --jobs 2

evidence-quick: install
	rm -rf build/evidence
	$(BIN)/pycdgkd experiment controlled --size quick --out build/evidence --jobs 2

# Kernel, op and public function of every case, timed apart.
bench: install
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-group-by=group \
	  --benchmark-columns=median,iqr,rounds --benchmark-sort=name

# The same code once in small sizes: a check, not a measurement.
bench-smoke: install
	$(BIN)/python -m pytest benchmarks --benchmark-disable --quiet

# All cases against all peers, about a quarter of an hour on an idle machine.
bench-report: install
	$(BIN)/python -m pip install --quiet pytorch-metric-learning torchdistill
	$(BIN)/pycdgkd bench --threads 1 2 --out benchmarks/results
	rm -f benchmarks/results/*.md
	$(MAKE) bench-table

bench-table: install
	$(BIN)/python benchmarks/render.py

# An environment that sees the packages of $(VENV) but not its editable install of pycdgkd.
define environment_beside
	rm -rf $(1)
	$(PYTHON) -m venv $(1)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])" \
	  > "$$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/beside.pth"
endef

# The op tests with the CUDA kernels in place of the CPU's, thread by thread on the CPU; then what
# depends on shared memory once more with next to none of it.
EMULATED := PYCDGKD_TEST_EMULATED=1 OMP_NUM_THREADS=1
emulate: install
	$(call environment_beside,build/emulate)
	PATH="$(abspath $(BIN)):$$PATH" PYCDGKD_EMULATE_CUDA=ON PYCDGKD_CUDA=OFF \
	  build/emulate/bin/python -m pip install --quiet --no-build-isolation --no-deps \
	  -C build-dir=build/emulate/cmake .
	$(EMULATED) build/emulate/bin/python -P -m pytest tests/ops
	$(EMULATED) PYCDGKD_EMULATED_SHARED=18000 build/emulate/bin/python -P -m pytest \
	  tests/ops/test_long_rows.py tests/ops/test_multi_source_kl.py \
	  tests/ops/test_distillation_loss.py tests/ops/test_teacher_loss.py \
	  tests/ops/test_small_teacher.py -k "not gradcheck"

# Registers and shared memory of every CUDA kernel by the compiler's word; no spills, no stacks.
gpu-resources: install
	$(BIN)/python tests/gpu/resources.py

# On a machine with a GPU and without a network: builds with what PYTHON has, checks and measures all.
gpu-check:
	$(PYTHON) tests/gpu/check.py

# Op tests against a build that traps bad memory accesses and undefined behaviour, the CUDA kernels'
# among them. Fresh memory is NaN there: what is read before it is written shows. Tracing tests are
# left out: they exercise Python, not the kernels.
SANITIZED = LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
  ASAN_OPTIONS=detect_leaks=0:max_malloc_fill_size=1000000000:malloc_fill_byte=255
sanitize: install
	$(call environment_beside,build/sanitize)
	PATH="$(abspath $(BIN)):$$PATH" PYCDGKD_SANITIZE=address,undefined PYCDGKD_CUDA=OFF \
	  PYCDGKD_EMULATE_CUDA=ON build/sanitize/bin/python -m pip install --quiet --no-build-isolation --no-deps \
	  -C build-dir=build/sanitize/cmake -C install.strip=false .
	$(SANITIZED) build/sanitize/bin/python -P -m pytest tests/ops \
	  -k "not compile and not opcheck and not process_group"
	$(SANITIZED) $(EMULATED) build/sanitize/bin/python -P -m pytest tests/ops/test_device_ops.py \
	  tests/ops/test_distillation_loss.py -k "not gradcheck"

# Built in an environment of its own, as `pip install .` does.
wheel:
	rm -rf dist
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist .

# One wheel, two versions of torch: the op tests must pass next to both.
wheel-proof: install wheel
	$(call environment_beside,build/wheel-newest)
	build/wheel-newest/bin/python -m pip install --quiet --no-deps dist/*.whl
	build/wheel-newest/bin/python -P -m pytest tests/ops
	rm -rf build/wheel-other && $(PYTHON) -m venv build/wheel-other
	build/wheel-other/bin/python -m pip install --quiet "$(OTHER_TORCH)" dist/*.whl pytest hypothesis
	build/wheel-other/bin/python -P -m pytest tests/ops

clean:
	rm -rf build dist runs
