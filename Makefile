# Every command a contributor runs. `make serve` and `make check` need Python 3.11+, git and make, nothing else.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# penstock[gpu] where an NVIDIA driver answers, penstock[cpu] elsewhere.
EXTRA  ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
# Without its pins: they would hold ml_dtypes at versions of 25 MB, which the serving environment shall not carry.
TRITONCLIENT := tritonclient==2.73.0
# What `make conformance` tests: a server it starts itself, or with URL= (and GRPC=) one that runs.
TARGET := $(if $(URL),--url $(URL)) $(if $(GRPC),--grpc $(GRPC)) $(if $(METRICS),--metrics $(METRICS))

.PHONY: help setup setup-check serve check lint test format proto docs clauses models conformance conformance-native conformance-asgi conformance-clients conformance-mlserver torture fuzz kills bench bench-standard bench-jobs bench-scheduling gpu-check wheel clean

help:
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{split($$1, name, ":"); printf "  make %-13s %s\n", name[1], $$2}'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Penstock needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serving: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable '.[$(EXTRA)]'
	@touch $@

$(VENV)/.checking: $(VENV)/.serving
	$(PIP) --editable '.[$(EXTRA),check]'
	$(PIP) --no-deps '$(TRITONCLIENT)'
	@touch $@

setup: $(VENV)/.serving ## the environment with what serving needs, and nothing else
setup-check: $(VENV)/.checking

serve: setup ## the server on model_repository/; ARGS="--http-port 9000" adds options
	$(BIN)/penstock serve --model-repository model_repository $(ARGS)

check: lint test conformance conformance-native conformance-asgi ## what a change must pass

lint: setup-check ## style, import floors, types, and that generated files are current
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/mypy server/tests server/docs runtimes/tests conformance_tests proto
	$(BIN)/python proto/compile.py --check
	$(BIN)/python server/docs/render.py --check

test: setup-check ## unit tests of both source roots
	$(BIN)/pytest -rs

conformance: setup-check ## protocol tests against a fresh server, or URL=http://... GRPC=host:port of a running one
	$(BIN)/pytest conformance_tests $(TARGET)

conformance-native: setup-check ## what concerns gRPC, again with the server's own HTTP/2
	$(BIN)/pytest conformance_tests -k grpc --serve=--grpc-transport=native

conformance-asgi: setup-check ## what concerns inferences over HTTP, again without the fast lane
	$(BIN)/pytest conformance_tests -k http --serve=--http-fast-lane=false

conformance-clients: setup-check ## foreign clients in environments of their own; ONLY=kserve for one; URL= and GRPC= as above
	$(BIN)/python -m conformance_tests.clients.run $(if $(URL),--url $(URL)) $(if $(GRPC),--grpc $(GRPC)) $(addprefix --only ,$(ONLY))

conformance-mlserver: setup-check ## which of OIP's clauses MLServer passes, into its RESULT.md or OUT=file.md
	$(BIN)/python -m conformance_tests.mlserver_reference.run $(OUT)

torture: fuzz kills ## the long runs

KILLS ?= 200
kills: setup-check ## the server killed so many times while jobs come, run, stream and end; then every job is accounted for
	$(BIN)/python -m conformance_tests.jobs.kill --kills $(KILLS) $(if $(SEED),--seed $(SEED))

FUZZ_CASES ?= 120000
fuzz: setup-check ## so many broken requests over JSON, binary framing, protobuf and raw bytes; SEED=, URL=, GRPC=
	$(BIN)/python -m conformance_tests.fuzz_http2
	$(BIN)/python -m conformance_tests.fuzz --cases $(FUZZ_CASES) $(if $(SEED),--seed $(SEED)) $(if $(URL),--url $(URL)) $(if $(GRPC),--grpc $(GRPC))

bench: bench-standard bench-jobs bench-scheduling ## all loads, into BENCHMARKS.md

bench-standard: setup-check ## the standard load, into BENCHMARKS.md; PERF_ANALYZER=path adds NVIDIA's client, ARGS=--no-record only looks
	$(BIN)/python -m conformance_tests.benchmarks.standard $(ARGS)

bench-jobs: setup-check ## what jobs cost, into BENCHMARKS.md; ARGS="--rounds 9 --folder /mnt/disk"
	$(BIN)/python -m conformance_tests.benchmarks.jobs $(ARGS)

# With the environment of `make setup` where there is one, with PYTHON as it is where that was given or there is none.
GPU_PYTHON = $(if $(filter command,$(firstword $(origin PYTHON))),$(PYTHON),$(or $(wildcard $(BIN)/python),$(PYTHON)))
gpu-check: ## what only a GPU can prove, into BENCHMARKS.md; no set-up needed. PYTHON= names another, ARGS=--only=device a part
	PYTHONPATH=.:server:runtimes$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON) -m conformance_tests.gpu $(ARGS)

bench-scheduling: setup-check ## batching beside ONNX Runtime itself, and overload, into BENCHMARKS.md; ARGS="--no-record --only cost"
	$(BIN)/python -m conformance_tests.benchmarks.scheduling $(ARGS)

format: setup-check ## put code into the project's form
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

proto: setup-check ## proto/ to wire.binpb and typing stubs
	$(BIN)/python proto/compile.py

clauses: setup-check ## server/docs/clauses.md, the table of clauses and their state
	$(BIN)/pytest conformance_tests --clauses-out server/docs/clauses.md

docs: setup-check ## the tables of server/docs/ from the code
	$(BIN)/python server/docs/render.py

models: setup-check ## train and write model_repository/ anew
	$(PIP) skl2onnx
	$(BIN)/python -m conformance_tests.models.make_models

wheel: setup-check ## sdist and wheel, installed once in a clean environment, and served from there
	$(PIP) build
	rm -rf dist && $(BIN)/python -m build --outdir dist .
	$(BIN)/python -m conformance_tests.wheel dist

clean: ## remove what was built here
	rm -rf $(VENV) .venv-clients dist build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
