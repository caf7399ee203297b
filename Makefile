# `make serve` and `make test` need Python 3.11+ and make; the rest they install into .venv.
# NYBBLE_TORCH=auto|cpu|cuda chooses the build of torch, TORCH_INDEX names one more index to find it in.

VENV   ?= .venv
ARGS   ?=
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; exit; }; done; echo python3)
BIN    := $(VENV)/bin
# A bare `import kernels` or `import server` from this folder must never find ours.
export PYTHONSAFEPATH = 1

.DEFAULT_GOAL := help
.PHONY: help env env-dev serve check test bench bench-more bench-jobs kernels-report gpu-check clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

# bootstrap.py keeps a stamp in the environment: a second call installs nothing.
BOOTSTRAP = command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found: install Python 3.11 or newer, or \
	run make PYTHON=/path/to/python" >&2; exit 2; }; $(PYTHON) scripts/bootstrap.py --venv $(VENV)

env: .cache/ns/nybble
	@$(BOOTSTRAP)

env-dev: .cache/ns/nybble
	@$(BOOTSTRAP) --extras dev

# The package under its name, without an install and whatever this clone is called.
.cache/ns/nybble:
	@mkdir -p .cache/ns && ln -sfn ../.. $@

serve: env ## serve the built-in demo model on 127.0.0.1:8000 (ARGS="MODEL --port 9000 ..." for more)
	@exec $(BIN)/nybble serve $(ARGS)

check: env-dev ## lint, format, types, architecture
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.cache/ns $(BIN)/mypy -p nybble.server -p nybble.engine -p nybble.kernels
	$(BIN)/python -m pytest -q tests/test_architecture.py

# The whole suite takes a process for each core, at most four of up to 3 GB; files stay together for their fixtures.
EVERY_CORE = -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: env-dev ## the whole test suite (ARGS="tests/engine -k sampler" for a part)
	$(BIN)/python -m pytest $(or $(ARGS),$(EVERY_CORE))

bench: env-dev ## load the demo model over HTTP: latency and throughput at 1, 8, 32 concurrent streams
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/serve.py $(ARGS)

bench-more: env-dev ## what socket and HTTP cost per token; start-up time, memory, idle CPU
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/overhead.py
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/startup.py

bench-jobs: env-dev ## a quantization job beside a stream: latency, the job's speed and memory (10 minutes)
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/job_latency.py $(ARGS)

kernels-report: env-dev ## compile the GPU kernels for sm_80 to sm_120 and gfx942, check and predict; needs no GPU
	PYTHONPATH=scripts $(BIN)/python scripts/kernels_report.py $(ARGS)

# No install: a machine with a GPU has torch and Triton in a Python of its own.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

gpu-check: ## on a machine with a GPU, without an install: the kernels' results, then their benchmarks (8 minutes)
	$(GPU_PYTHON) scripts/gpu_check.py $(ARGS)

clean: ## remove the environment and what tools left behind
	rm -rf $(VENV) .cache/ns build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
