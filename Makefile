# HillInfer. `make` alone lists the targets.
.DEFAULT_GOAL := help
.PHONY: help setup run test test-long test-vm bench deb test-systemd lint format proto man clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
NATIVE := $(shell find core/native -type f)

# The first interpreter that is new enough; name another with `make setup PYTHON=/path/to/python3`.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)

# Processes that share the test files of `make test`; much of their time is waiting. 0: all in one, as for a debugger.
WORKERS ?= 2

PIP := $(BIN)/python -m pip --disable-pip-version-check

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv and install everything into it (quick when nothing changed)

$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	@tools/system-packages $(PYTHON)
	@test -x $(BIN)/pip || $(or $(PYTHON),python3) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	@# Only its copy of the ap_int headers is used, by the C simulation; its dependencies would be many and large.
	$(PIP) install -q -c constraints.txt --no-deps hls4ml
	@touch $@

run: setup ## answer four questions about a 16K-token text through the daemon (more: make run ARGS=--help)
	@$(BIN)/hillinfer demo $(ARGS)

test: setup ## run the tests (one file: make test ARGS=tests/cli/test_tasks.py)
	$(BIN)/python -m pytest -m "not long" -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-long: setup ## run the tests of hundreds of repetitions, and property tests with other examples
	$(BIN)/python -m pytest -m "long or hypothesis" --hypothesis-profile=exploring $(ARGS)

test-vm: setup ## run the tests of failing and unplugged drives in a virtual machine (docs/testing-vm.md)
	$(BIN)/python tests/vm/run.py $(ARGS)

bench: setup ## measure this machine as docs/ does, into build/bench (some: make bench ARGS="kernel kvpath")
	$(BIN)/python tools/bench.py $(ARGS)

deb: man ## build the Debian package of the system service in dist/ (docs/systemd.md)
	packaging/build-deb $(BIN)/python

test-systemd: deb ## install the package and run the service under a real systemd; needs root (docs/systemd.md)
	HILLINFER_SYSTEMD=1 $(BIN)/python -m pytest tests/systemd $(ARGS)

lint: setup ## style, types and import rules; what CI checks before the tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## let ruff rewrite what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

proto: setup ## generate core/hillinfer_core/v1 from proto/
	$(BIN)/python -m grpc_tools.protoc -Ihillinfer_core/v1=proto/hillinfer/v1 \
		--python_out=core --pyi_out=core --grpc_python_out=core \
		hillinfer_core/v1/admin.proto hillinfer_core/v1/attach.proto hillinfer_core/v1/cold_pool.proto

man: setup ## write man pages and shell completion to build/man and build/completions
	$(BIN)/python tools/manual.py build

clean: ## remove .venv, build output and caches
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
