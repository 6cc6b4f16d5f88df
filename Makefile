# Two commands do everything: `make demo` and `make test`. Both set up `.venv` first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Compiled again whenever its sources change; where there is no compiler the package works without it.
CORE := $(VENV)/.core
CORE_SOURCES := setup.py scripts/build_backend.py $(wildcard src/qwen3_vl_memory_optimizations/native/core/*)
WHEEL := .venv-wheel

# The lowest versions that pyproject.toml promises; `make test` has the newest.
OLDEST := .venv-oldest
# Names, settings, answers of the small model within a budget, the command line, and what extras bring.
ESSENTIAL := tests/test_public_names.py tests/test_config.py tests/test_integration.py tests/cli/test_generate.py \
	tests/monitoring/test_exporter.py tests/monitoring/test_dashboard.py

# Rooms below the model, and one answer from the command line; without files that take more than ten seconds.
FAST := tests/cache tests/compression tests/pools tests/prediction tests/profiles tests/runtime_policy tests/storage \
	tests/cli/test_generate.py::test_the_answer_is_all_there_is_on_stdout tests/test_architecture_page.py \
	tests/test_config.py tests/test_decisions.py tests/test_public_names.py
LONG := tests/compression/test_avx2.py tests/compression/test_kernels.py tests/compression/test_selection.py \
	tests/compression/test_suited_codecs.py tests/pools/test_page_size.py tests/profiles/test_choice.py \
	tests/runtime_policy/test_algorithms.py tests/runtime_policy/test_real_tensors.py

.PHONY: setup demo test test-fast test-oldest test-wheel check format bench bench-quick bench-budget bench-accuracy clean

setup: $(CORE)

$(READY): pyproject.toml scripts/install_torch.sh
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	scripts/install_torch.sh $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[dev,video]'
	touch $(READY)

$(CORE): $(READY) $(CORE_SOURCES)
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $(CORE)

demo: $(CORE)
	$(BIN)/qwen3vl-mem demo

# Two at a time, whose threads must not spin; what fails runs again alone, and only that counts.
test: $(CORE)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile || \
		$(BIN)/python -m pytest --last-failed --last-failed-no-failures none

test-fast: $(CORE)
	$(BIN)/python -m pytest $(FAST) $(LONG:%=--ignore=%)

test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest $(ESSENTIAL)

$(OLDEST)/.ready: pyproject.toml scripts/install_torch.sh
	rm -rf $(OLDEST)
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip uv
	scripts/install_torch.sh $(OLDEST)/bin/python
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct \
		--only-binary numpy --only-binary pillow --only-binary psutil --only-binary xxhash -e '.[dev,video,energy]'
	touch $(OLDEST)/.ready

# What a user installs: a wheel built from the source archive, in an empty environment, without a compiler in reach.
test-wheel: $(READY)
	rm -rf dist $(WHEEL)
	$(BIN)/python -m build --outdir dist
	$(PYTHON) -m venv $(WHEEL)
	scripts/install_torch.sh $(WHEEL)/bin/python
	$(WHEEL)/bin/python -m pip install --quiet dist/*.whl
	cd $(WHEEL) && env PATH=bin HF_HUB_OFFLINE=1 bin/python -c \
		"from qwen3_vl_memory_optimizations.native import core; print('kernels:', core().isa)"
	cd $(WHEEL) && env PATH=bin HF_HUB_OFFLINE=1 bin/qwen3vl-mem demo --quick --cache-dir cache

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Beside other systems: hours with everything; `PEERS_OPTIONS=--quick` for minutes.
PEERS_SHAPES ?= 2B
PEERS_OPTIONS ?=
PEERS_RUN = $(BIN)/python benchmarks/peers/run.py --shapes $(PEERS_SHAPES) $(PEERS_OPTIONS)
bench: $(READY)
	$(BIN)/python -m pip install --quiet -e '.[bench]'
	$(BIN)/python benchmarks/peers/prepare.py --shapes $(PEERS_SHAPES)
	$(PEERS_RUN)
	$(if $(findstring --quick,$(PEERS_OPTIONS)),,$(PEERS_RUN) --avx2)

# A few ratios in under three minutes, compared with those that are committed.
bench-quick: $(READY)
	$(BIN)/python benchmarks/quick/run.py

MODEL ?= .bench/2B
bench-budget: $(READY)
	test -d $(MODEL) || $(BIN)/python benchmarks/make_checkpoint.py 2B $(MODEL)
	$(BIN)/python benchmarks/budget/run.py $(MODEL) --cache-dir .bench/cache --limits 2.6 1.6 1.2

# Every codec on the tiny model and on SmolLM2-135M, which is fetched; what was measured before is kept.
bench-accuracy: $(READY)
	$(BIN)/python -m pip install --quiet -e '.[bench]'
	$(BIN)/python benchmarks/accuracy/run.py

clean:
	rm -rf $(VENV) $(OLDEST) .pytest_cache .mypy_cache .ruff_cache build *.egg-info src/*.egg-info
