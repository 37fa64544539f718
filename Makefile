PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
BUF := @bufbuild/buf@1.75.0
NPX := npm_config_fetch_retries=1 npm_config_fetch_timeout=60000 npx --yes
COMPOSE ?= docker compose
PAIR ?= bundled
PROMPT ?=
export PROMPT
# PyTorch's own index has builds without CUDA, a tenth of the size. Where a GPU is, or pip has sources of its own, torch
# comes from wherever pip finds it. TORCH_INDEX_URL= says so too; it may also name another index.
HAS_OWN_SOURCES = $(shell command -v nvidia-smi; env | grep -E "^PIP_(INDEX_URL|EXTRA_INDEX_URL|FIND_LINKS)="; \
  $(PYTHON) -m pip config list 2>/dev/null | grep -E "index-url|find-links")
TORCH_INDEX_URL ?= $(if $(HAS_OWN_SOURCES),,https://download.pytorch.org/whl/cpu)

PROTOC = PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m grpc_tools.protoc -I protos
PROTO_FILES = protos/easyspec/v1/*.proto
stubs_into = $(PROTOC) --python_out=$(1) --grpc_python_out=$(1) --mypy_out=$(1) --mypy_grpc_out=$(1) $(PROTO_FILES)

RUN_FLAGS = --temperature 0 --max-tokens 256 --show-speculation --compare
# Of guesses from the text alone: a row more costs a pass of so small a model a tenth.
SMALL_TREES = --num-nodes 3 --num-draft-levels 3

.DEFAULT_GOAL := help
.PHONY: help install dev wheel run serve up image compose-up compose-down test test-slow check check-protos format protos docs release-check bench bench-pair train-models

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv with what running takes, pinned, and the built library (only when one changed)

dev: $(DEV_STAMP) ## the same, and what testing, checking and measuring take

$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard easyspec/ops/cpp/*)
	$(PYTHON) -m venv $(VENV)
	@$(if $(TORCH_INDEX_URL),$(BIN)/pip install --quiet --retries 1 --timeout 15 -c constraints.txt --index-url $(TORCH_INDEX_URL) torch \
	  || echo "easyspec: no torch from $(TORCH_INDEX_URL); taking the one that pip finds elsewhere")
	$(BIN)/pip install --quiet -c constraints.txt -e .
	@$(BIN)/python -c 'from easyspec.ops.native_library import library_problem as p; \
	  p() and print("easyspec: models will run on the slower reference executor:", p())'
	@touch $@

$(DEV_STAMP): $(STAMP)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

wheel: install ## make dist/easyspec-*.whl with the built library: where it is installed, no compiler is needed
	rm -rf build dist/easyspec-*.whl
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/easyspec-*linux*.whl || { echo "the wheel has no library: run 'pip wheel -v .' to see why"; exit 1; }

release-check: wheel ## build and install what would be released, and say what was checked
	TORCH_INDEX_URL='$(TORCH_INDEX_URL)' deploy/release_check.sh $(BIN)/python

run: install ## ask a real model a question (PROMPT=...) through all three services; it is fetched once, 98 MB
	@if $(BIN)/easyspec fetch smollm2 >/dev/null; then \
	  $(BIN)/easyspec generate smollm2 "$${PROMPT:-What is the capital of France?}" --chat $(RUN_FLAGS) $(SMALL_TREES); \
	else \
	  echo "NO REAL MODEL: it could not be fetched (above). The small bundled one completes Python instead." >&2; \
	  $(BIN)/easyspec generate models/base "$${PROMPT:-class Stack:}" $(RUN_FLAGS); \
	fi

serve: install ## start drafter, verifier and gateway with the model of make run; Ctrl-C drains and stops them
	@$(BIN)/easyspec fetch smollm2 >/dev/null || echo "NO REAL MODEL: it could not be fetched (above)." >&2
	$(BIN)/easyspec up

up: serve ## the same as serve

image: ## build the container image easyspec:latest (CPU; TORCH_INDEX_URL names another source of torch)
	$(COMPOSE) build verifier

compose-up: ## start the three roles in containers, REST on 127.0.0.1:8000, gRPC on 127.0.0.1:50051
	$(COMPOSE) up --detach --build

compose-down: ## stop and remove them
	$(COMPOSE) down

test: dev ## the tests without the slow ones, a process a core
	$(BIN)/python -m pytest --numprocesses auto --dist loadscope

test-slow: test ## every test; the slow ones alone on the machine, and which were skipped
	$(BIN)/python -m pytest -m slow -rs

check: dev check-protos ## lint, format, types, protos and their committed stubs; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check-protos: dev
	@stubs=$$(mktemp -d) && trap 'rm -rf "$$stubs"' EXIT && $(call stubs_into,"$$stubs") \
	  && diff -rq --exclude=__init__.py --exclude=__pycache__ "$$stubs/easyspec/v1" easyspec/v1 \
	  && echo "stubs match the protos" || { echo "stubs differ from the protos: run 'make protos'"; exit 1; }
	@if $(NPX) $(BUF) --version >/dev/null 2>&1; then $(NPX) $(BUF) lint && echo "buf lint: clean"; \
	  else echo "buf lint: SKIPPED, npx cannot get $(BUF) here"; fi

format: dev ## format the code and apply safe lint fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: dev ## regenerate the committed stubs in easyspec/v1
	$(call stubs_into,.)

docs: dev ## regenerate the reference pages: docs/configuration.md, docs/api-rest.md, docs/api-grpc.md
	$(BIN)/python -m docs.reference

bench: dev ## measure decoding and render docs/benchmarks.md (PAIR=bench after make bench-pair)
	$(BIN)/easyspec bench decode --pair $(PAIR) --json docs/benchmarks/decode-$(PAIR).json
	$(BIN)/python -m bench.report

bench-pair: dev ## widen the bundled models to a realistic cost (into .bench/)
	$(BIN)/python -m models.recipe widen
	$(BIN)/python -m models.recipe widen --source models/draft --factor 10 --extra-layers 0 --out .bench/draft
	$(BIN)/python -m models.recipe widen --source models/base-small --out .bench/base-small

train-models: dev ## train the bundled models again from the standard library (about two hours)
	$(BIN)/python -m models.recipe train
	$(BIN)/python -m models.recipe cut
