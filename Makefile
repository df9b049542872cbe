# The two commands: `make run` serves, `make test` tests. Both set up what they need, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PROTOS := $(wildcard proto/sidecar/v1/*.proto)

.DEFAULT_GOAL := help
.PHONY: help setup run test check format proto bench drill lock wheel clean

help: ## What one can make
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

setup: $(READY) ## Create the virtual environment with the pinned dependencies

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, and $(PYTHON) is `$(PYTHON) --version 2>&1`."; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "==> creating $(VENV) with the pinned dependencies (about half a minute, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

run: $(READY) ## Start the sidecar with the embedded NATS server (ARGS="--config my.toml" for yours)
	@exec $(BIN)/sidecar run $(ARGS)

test: $(READY) ## The whole suite, on real servers (ARGS="-k name" for a part)
	@$(BIN)/python -m tests.support.kafka
	@echo "==> testing"
	@$(BIN)/pytest -n 2 --dist loadfile $(ARGS)

check: $(READY) ## Lint, types, import contracts, and generated code in step with proto/
	@echo "==> ruff"; $(BIN)/ruff check --quiet . && $(BIN)/ruff format --check --quiet .
	@echo "==> mypy"; $(BIN)/mypy --no-error-summary
	@echo "==> import contracts"; $(BIN)/lint-imports --no-cache > $(VENV)/imports.log || { cat $(VENV)/imports.log; exit 1; }
	@echo "==> buf lint"; $(BIN)/buf lint proto
	@echo "==> buf breaking"; $(BIN)/python tests/support/breaking.py
	@echo "==> generated code"; rm -rf $(VENV)/generated && mkdir $(VENV)/generated && $(call generate,$(VENV)/generated) \
	  && diff -r -x __init__.py -x __pycache__ $(VENV)/generated/sidecar/v1 sidecar/v1 \
	  || { echo "sidecar/v1 is not what proto/ says: run 'make proto' and commit"; exit 1; }
	@echo "all good"

format: $(READY) ## Format the code
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix --quiet .

define generate
$(BIN)/python -m grpc_tools.protoc -I proto --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) $(PROTOS)
endef

proto: $(READY) ## Generate sidecar/v1 from proto/
	@$(call generate,.)

bench: $(READY) ## Measure on each broker against its raw client library, in one run
	@$(BIN)/python -m tests.benchmarks $(ARGS)

drill: $(READY) ## Longer drills: 200,000 events (Kafka: 100,000) over killed servers and sidecars
	@$(BIN)/python -m tests.drills $(ARGS)

lock: $(READY) ## Pin the dependencies anew (UPGRADE=1 for newer ones)
	@$(BIN)/uv pip compile pyproject.toml --group dev --universal --python-version 3.11 --generate-hashes \
	  --no-header $(if $(UPGRADE),--upgrade) --quiet -o requirements.lock

wheel: $(READY) ## Build the wheel into dist/
	@$(BIN)/python -m build --wheel --no-isolation --outdir dist . > /dev/null && ls dist/*.whl

clean: ## Remove the virtual environment and every cache
	@rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build
