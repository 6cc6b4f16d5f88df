# Two commands do everything: `make demo` and `make test`. Both set up `.venv` first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test check format bench bench-quick bench-budget bench-accuracy clean

setup: $(READY)

$(READY): pyproject.toml scripts/install_torch.sh
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	scripts/install_torch.sh $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[dev,video]'
	touch $(READY)

demo: $(READY)
	$(BIN)/qwen3vl-mem demo

test: $(READY)
	$(BIN)/python -m pytest

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
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info src/*.egg-info
