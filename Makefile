# `make` lists the targets. Each one makes what it needs; nothing has to be set up by hand.
.DEFAULT_GOAL := help
SHELL := bash
BIN := .venv/bin
PURE := tests/arch tests/base tests/core tests/cluster tests/wire tests/engine/test_toy.py
PROTO_ENV := build/proto-env

.PHONY: help setup fmt fmt-check lint test test-etcd test-all proto proto-check sizes bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.* ## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.* ## (.*)/  \1\t\2/' | expand -t 16

setup: ## make .venv with the package and what its tests need; at once when it is there
	@scripts/setup_env.sh test

fmt: setup ## sort imports and format
	$(BIN)/ruff check --select I --fix --quiet .
	$(BIN)/ruff format .

fmt-check: setup ## is everything formatted?
	$(BIN)/ruff format --check .

lint: setup ## ruff, import contracts, mypy
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

test: setup ## the house rules and what decides: floors 0 to 2 and the toy executor, in seconds
	$(BIN)/pytest -q -n 2 $(PURE)

test-etcd: setup ## what talks to a real etcd; skipped by name when none is on PATH
	$(BIN)/pytest -q -m etcd tests/registry tests/conformance

test-all: ## everything, as CI does it
	scripts/test.sh

proto: $(PROTO_ENV)/made ## make control/pb from control/xllm.proto
	PROTO_PYTHON=$(PROTO_ENV)/bin/python scripts/gen_proto.sh

proto-check: $(PROTO_ENV)/made ## is control/pb what control/xllm.proto says?
	PROTO_PYTHON=$(PROTO_ENV)/bin/python scripts/gen_proto.sh --check

$(PROTO_ENV)/made: scripts/gen_proto.sh
	scripts/gen_proto.sh --environment $(PROTO_ENV)
	@touch $@

sizes: setup ## the ten longest files and functions; fails over the limits
	$(BIN)/python scripts/sizes.py

bench: setup ## every benchmark, one after the other, one JSON line per answer
	@for file in $$(grep -l '__name__ == "__main__"' benchmarks/*.py); do \
		name=$$(basename $$file .py); echo "# benchmarks.$$name" >&2; \
		$(BIN)/python -m benchmarks.$$name || exit 1; \
	done

clean: ## remove caches and what was built; .venv stays
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find xllm_py tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
