# `make demo` and `make test` need nothing but Python >= 3.10: they make their own environment in $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
WORKERS ?= 2
# one thread per test worker: the models are tiny, and two pools of threads on the same cores slow each other down
TEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q
# constraints.txt holds versions that were tested together
INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test docs matrix nox clients serving conformance parity zero3 lint format \
	train-demo evaluate-demo build lock clean

demo: $(VENV)/.demo
	$(BIN)/vlbridge compare zoo/assets/photograph.jpg zoo/assets/example.png
	$(BIN)/vlbridge ask zoo/assets/example.png "what color is the shape?"

test: $(VENV)/.dev
	$(TEST)

# the documentation, into site/; warnings are errors
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# the same with the lowest, the locked and the newest versions that setup.cfg allows, in environments of their own
matrix: $(VENV)/.dev
	WORKERS=$(WORKERS) $(BIN)/nox --session oldest locked newest

# nox alone, which makes the environments of its sessions
nox: $(VENV)/.made
	$(INSTALL) "nox[uv]"

# TRL, lmms-eval and lm-eval themselves, in an environment of their own
clients: $(VENV)/.dev
	WORKERS=$(WORKERS) $(BIN)/nox --session clients

# vLLM's CPU build, in an environment of its own
serving: $(VENV)/.dev
	$(BIN)/nox --session serving

conformance: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/conformance/run_conformance.py

# official models and outputs in PARITY_ROOT/<family>/<case>
PARITY_ROOT ?= tests/parity/cases
parity: $(VENV)/.dev
	$(TEST) tests/parity --parity-root $(PARITY_ROOT)

# the tests of two processes with DeepSpeed's ZeRO-3 among them; it compiles a little C++
zero3: $(VENV)/.dev
	DS_BUILD_OPS=0 $(INSTALL) deepspeed
	WITH_ZERO3=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(TEST) -n 0 tests/training/test_training_distributed.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/check_structure.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# about three and a half hours on two CPU cores (and an hour for the evaluation); --dtype bfloat16 is faster on a CPU with AMX
train-demo: $(VENV)/.dev
	$(BIN)/python examples/easy_vqa.py --output runs/drawings
	$(BIN)/python examples/three_bridges.py train mlp --drawings runs/drawings --steps 480 --dtype float32 \
		--output zoo/assets/embedded_mlp
	$(BIN)/python examples/three_bridges.py train qformer --steps 200 --dtype float32 \
		--output zoo/assets/embedded_qformer

# PHOTOS: folders of photographs to ask about too, each behind --photos
evaluate-demo: $(VENV)/.dev
	$(BIN)/python examples/three_bridges.py evaluate --model zoo/assets/embedded_mlp $(PHOTOS) \
		--output benchmarks/results/embedded_mlp.json
	$(BIN)/python examples/three_bridges.py evaluate --model zoo/assets/embedded_qformer \
		--output benchmarks/results/embedded_qformer.json

build: $(VENV)/.dev
	$(BIN)/python -m build

# takes the newest versions that setup.cfg allows; to hold some back, name a constraints file in UV_CONSTRAINT
lock: $(VENV)/.made
	$(BIN)/python -m pip install --quiet --upgrade uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --upgrade --no-annotate \
		--custom-compile-command "make lock" --all-extras --output-file constraints.txt setup.cfg

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

$(VENV)/.demo: $(VENV)/.made setup.cfg pyproject.toml constraints.txt
	$(INSTALL) --editable ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(INSTALL) --editable ".[dev]"
	touch $@

$(VENV)/.docs: $(VENV)/.demo
	$(INSTALL) --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) .nox build dist site *.egg-info .pytest_cache .ruff_cache
