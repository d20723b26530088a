# `make demo` and `make test` need nothing but Python >= 3.10: they make their own environment in $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
WORKERS ?= 2
# one thread per test worker: the models are tiny, and two pools of threads on the same cores slow each other down
TEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q

.PHONY: demo test conformance parity zero3 lint format train-demo evaluate-demo build clean

demo: $(VENV)/.demo
	$(BIN)/vlbridge caption zoo/assets/example.png
	$(BIN)/vlbridge ask zoo/assets/example.png "what color is the shape?"

test: $(VENV)/.dev
	$(TEST)

conformance: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/conformance/run_conformance.py

# official models and outputs in PARITY_ROOT/<family>/<case>
PARITY_ROOT ?= tests/parity/cases
parity: $(VENV)/.dev
	$(TEST) tests/parity --parity-root $(PARITY_ROOT)

# the tests of two processes with DeepSpeed's ZeRO-3 among them; it compiles a little C++
zero3: $(VENV)/.dev
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet deepspeed
	WITH_ZERO3=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(TEST) -n 0 tests/training/test_training_distributed.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# about half an hour on two CPU cores (fifteen minutes for its evaluation), with nothing else running
train-demo: $(VENV)/.dev
	$(BIN)/python -m vlbridge.training.training_easy_vqa train --output zoo/assets/easy_vqa_mlp

evaluate-demo: $(VENV)/.dev
	$(BIN)/python -m vlbridge.training.training_easy_vqa evaluate --output benchmarks/results/easy_vqa_mlp.json

build: $(VENV)/.dev
	$(BIN)/python -m build

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

$(VENV)/.demo: $(VENV)/.made setup.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
