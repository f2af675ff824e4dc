# `make` alone lists the targets. Every target sets up what it is missing.
PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
READY := .venv/.ready
KERNEL := .venv/.kernel
GENERATORS := .venv-protos/.ready

.DEFAULT_GOAL := help
.PHONY: help setup up test check fmt lint types protos protos-check bench lossless chaos soak audit clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  ARGS="..." is passed on by up, test, bench, lossless, chaos and soak'

setup: $(READY) $(KERNEL) ## make .venv, install everything, build the C++ kernel

$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo 'installing into .venv: a minute or two, torch is large'
	$(BIN)/python -m pip install --quiet --editable '.[router,model,cli,dev]' --constraint constraints.txt
	@touch $@

$(KERNEL): $(READY) $(wildcard kernels/specinfer_kernels/csrc/*) kernels/specinfer_kernels/build.py
	$(BIN)/python -m specinfer_kernels.build
	@touch $@

$(GENERATORS): protos/requirements.txt
	@test -x .venv-protos/bin/python || $(PYTHON) -m venv .venv-protos
	.venv-protos/bin/python -m pip install --quiet --requirement protos/requirements.txt
	@touch $@

up: setup ## serve the demo pair: router, draft and verify; Ctrl-C ends all
	@$(BIN)/specinfer up $(ARGS)

# Two processes, a file at a time: first the quick tests, then those that start clusters. What fails is
# run once more by itself, and both runs are shown: some tests need a processor that is not busy.
PYTEST := $(BIN)/python -m pytest
TOGETHER := OMP_WAIT_POLICY=passive $(PYTEST) --numprocesses 2 --dist loadfile
AGAIN := $(PYTEST) --last-failed --last-failed-no-failures none
QUICK := tests/unit tests/kernels tests/contracts tests/conformance

test: setup ## run the tests; ARGS="tests/unit -k tree" runs some
ifeq ($(strip $(ARGS)),)
	$(TOGETHER) $(QUICK) || $(AGAIN)
	$(TOGETHER) $(addprefix --ignore=,$(QUICK)) || $(AGAIN)
else
	$(PYTEST) $(ARGS)
endif

check: lint types protos-check test ## all that CI checks

fmt: setup ## format Python and protos, sort imports
	$(BIN)/ruff check --select I --fix --quiet .
	$(BIN)/ruff format .
	$(BIN)/buf format --write

lint: setup ## ruff, import contracts, sizes, the references of SDK and metrics, dashboards
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python tools/check_sizes.py
	$(BIN)/python tools/generate_api.py --check
	$(BIN)/python tools/generate_settings.py --check
	$(BIN)/python tools/generate_metrics.py --check
	$(BIN)/python tools/generate_rules.py --check
	$(BIN)/python tools/generate_performance.py --check
	$(BIN)/python deploy/grafana/build_dashboards.py --check

types: setup ## mypy (strict) and pyright
	$(BIN)/mypy
	$(BIN)/pyright

protos: setup $(GENERATORS) ## generate specinfer/v1 from the protos
	.venv-protos/bin/python tools/generate_protos.py

protos-check: setup $(GENERATORS) ## lint the protos; specinfer/v1 must be what they give
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	.venv-protos/bin/python tools/generate_protos.py --check

bench: setup ## measure what 15 minutes allow; writes docs/performance.md
	@$(BIN)/python -m specinfer_bench.suite $(ARGS)

lossless: setup ## prove that speculation changes no token
	@$(BIN)/specinfer lossless $(ARGS)

chaos: setup ## break a cluster under load; writes docs/chaos.md
	@$(BIN)/python -m specinfer_bench.chaos $(ARGS)

soak: setup ## an hour of mixed load; nothing may grow or be left over
	@$(BIN)/python -m specinfer_bench.chaos.soak $(ARGS)

audit: setup ## known vulnerabilities of the pinned packages; asks PyPI's advisory database
	$(BIN)/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt

clean: ## remove the environments, caches and built files
	rm -rf .venv .venv-protos .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
