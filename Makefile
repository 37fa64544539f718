PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BUF := @bufbuild/buf@1.75.0
NPX := npm_config_fetch_retries=1 npm_config_fetch_timeout=60000 npx --yes
COMPOSE ?= docker compose
PROMPT ?= class Stack:
PAIR ?= bundled

PROTOC = PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m grpc_tools.protoc -I protos
PROTO_FILES = protos/easyspec/v1/*.proto
stubs_into = $(PROTOC) --python_out=$(1) --grpc_python_out=$(1) --mypy_out=$(1) --mypy_grpc_out=$(1) $(PROTO_FILES)

.DEFAULT_GOAL := help
.PHONY: help install wheel run serve up image compose-up compose-down test test-slow check check-protos format protos bench bench-pair train-models

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv with the pinned dependencies and the built library (only when one changed)

$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard easyspec/ops/cpp/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@$(BIN)/python -c 'from easyspec.ops.native_library import library_problem as p; \
	  p() and print("easyspec: models will run on the slower reference executor:", p())'
	@touch $@

wheel: install ## make dist/easyspec-*.whl with the built library: where it is installed, no compiler is needed
	rm -rf build dist/easyspec-*.whl
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/easyspec-*linux*.whl || { echo "the wheel has no library: run 'pip wheel -v .' to see why"; exit 1; }

run: install ## stream one completion from the bundled models through all three services
	$(BIN)/easyspec generate "$(PROMPT)" --show-speculation --max-tokens 96 --temperature 0.6 --seed 3

serve: install ## start drafter, verifier and gateway; Ctrl-C drains and stops them
	$(BIN)/easyspec up

up: serve ## the same as serve

image: ## build the container image easyspec:latest (CPU; TORCH_INDEX_URL names another source of torch)
	$(COMPOSE) build verifier

compose-up: ## start the three roles in containers, REST on 127.0.0.1:8000, gRPC on 127.0.0.1:50051
	$(COMPOSE) up --detach --build

compose-down: ## stop and remove them
	$(COMPOSE) down

test: install ## the tests without the slow ones
	$(BIN)/python -m pytest

test-slow: install ## every test
	$(BIN)/python -m pytest -m ''

check: install check-protos ## lint, format, types, protos and their committed stubs; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check-protos: install
	@stubs=$$(mktemp -d) && trap 'rm -rf "$$stubs"' EXIT && $(call stubs_into,"$$stubs") \
	  && diff -rq --exclude=__init__.py --exclude=__pycache__ "$$stubs/easyspec/v1" easyspec/v1 \
	  && echo "stubs match the protos" || { echo "stubs differ from the protos: run 'make protos'"; exit 1; }
	@if $(NPX) $(BUF) --version >/dev/null 2>&1; then $(NPX) $(BUF) lint && echo "buf lint: clean"; \
	  else echo "buf lint: SKIPPED, npx cannot get $(BUF) here"; fi

format: install ## format the code and apply safe lint fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: install ## regenerate the committed stubs in easyspec/v1
	$(call stubs_into,.)

bench: install ## measure decoding and render docs/benchmarks.md (PAIR=bench after make bench-pair)
	$(BIN)/easyspec bench decode --pair $(PAIR) --json docs/benchmarks/decode-$(PAIR).json
	$(BIN)/python -m bench.report

bench-pair: install ## widen the bundled base models to a realistic cost (into .bench/)
	$(BIN)/python -m models.recipe widen
	$(BIN)/python -m models.recipe widen --source models/base-small --out .bench/base-small

train-models: install ## train the bundled models again from the standard library (about two hours)
	$(BIN)/python -m models.recipe train
	$(BIN)/python -m models.recipe cut
