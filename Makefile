# Everything runs in virtual environments of its own, made on first use and refreshed when their inputs change.
# Prerequisites: python3 (3.11 or newer) with python3-venv and python3-dev, gcc, make. `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
DEMO_VENV ?= .venv-demo
TEST_VENV ?= .venv-test
VLLM_VENV ?= .venv-vllm
TORCH ?= torch==2.13.0
MODELS ?= kimi_linear qwen3_next gemma3 falcon_h1
DEMO_ARGS ?=
PYTEST_ARGS ?=
# Files of tests side by side; many of them wait more than they work.
PYTEST_JOBS ?= 2
FUZZ_SECONDS ?= 60
FUZZ_ARGS ?=
FUZZ_FINDINGS ?= benchmarks/results/local/fuzz
SOAK_MINUTES ?= 30
SOAK_JSON ?= benchmarks/results/local/soak.json
SEEDS ?= 10000
RUNS ?= 2
ABORTS ?= 10000
FAULTS_OUT ?= benchmarks/results/local/faults.json
FAULTS_ARGS ?=
CLUSTER_OUT ?= benchmarks/results/local/cluster-faults.json
CLUSTER_ARGS ?=
CLUSTER_SEEDS ?= 5000
SIM_OUT ?= benchmarks/results/local/sim
# Twice quiet: errors only.
PIP_FLAGS ?= -qq
ENGINES_OUT ?= benchmarks/results/local/engines
BENCH_JSON ?= benchmarks/results/local/$(shell date -u +%Y%m%dT%H%M%SZ).json

# A broken or missing extension fails here instead of falling back to the pure-Python twin.
export KVTRANSPORT_REQUIRE_NATIVE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BUILD_INPUTS := pyproject.toml setup.py $(shell find native -name '*.[ch]' 2>/dev/null)
PACKAGE_FILES := $(shell find kvtransport kvpool -type f ! -name '*.so' ! -path '*/__pycache__/*' 2>/dev/null)
DEMO_STAMP := $(DEMO_VENV)/.installed
TEST_STAMP := $(TEST_VENV)/.installed
VLLM_STAMP := $(VLLM_VENV)/.installed

.PHONY: help demo demo-real test test-sim test-sim-cluster test-faults test-cluster test-engines test-engines-quick bench lint types test-native fuzz soak clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | while IFS=$$'\t' read -r t d; do printf '  %-18s %s\n' "$$t" "$$d"; done

# -- environments -----------------------------------------------------------------------------------

# The two things that go wrong on a bare machine, said before pip says them at length.
define check_prerequisites
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is missing or older than 3.11: install python3, or say make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
		|| { echo "this Python cannot make virtual environments: install python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig as s, sys; sys.exit(not os.path.exists(os.path.join(s.get_path("include"), "Python.h")))' \
		|| { echo "Python.h is missing: install python3-dev" >&2; exit 1; }
	@command -v $${CC:-gcc} >/dev/null || { echo "no C compiler: install gcc" >&2; exit 1; }
endef

# The demo runs what a user would install: a copy, without torch.
$(DEMO_STAMP): $(BUILD_INPUTS) $(PACKAGE_FILES) README.md LICENSE
	$(check_prerequisites)
	test -x $(DEMO_VENV)/bin/python || $(PYTHON) -m venv $(DEMO_VENV)
	rm -rf build # setuptools would copy modules from it that are gone from the tree
	$(DEMO_VENV)/bin/python -m pip install $(PIP_FLAGS) .
	@touch $@

# torch first and alone, so that no other requirement can choose another build of it.
$(TEST_STAMP): $(BUILD_INPUTS)
	$(check_prerequisites)
	test -x $(TEST_VENV)/bin/python || $(PYTHON) -m venv $(TEST_VENV)
	$(TEST_VENV)/bin/python -m pip install $(PIP_FLAGS) "$(TORCH)"
	$(TEST_VENV)/bin/python -m pip install $(PIP_FLAGS) -e '.[dev,engines]'
	@touch $@

# Which packages, and why so: in the script.
$(VLLM_STAMP): $(BUILD_INPUTS) $(wildcard tests/engines/make_venv.sh tests/engines/constraints.txt tests/engines/vllm_requirements.py)
	$(check_prerequisites)
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" bash tests/engines/make_venv.sh "$(VLLM_VENV)"

# -- what people run ----------------------------------------------------------------------------------

demo: $(DEMO_STAMP) ## The main job on loopback, without torch (DEMO_ARGS="--direct")
	$(DEMO_VENV)/bin/kvpool demo $(DEMO_ARGS)

test: $(TEST_STAMP) ## All tests, with torch and transformers (PYTEST_ARGS="-k ..." PYTEST_JOBS=2)
	$(TEST_VENV)/bin/python -m pytest -n $(PYTEST_JOBS) --dist loadfile $(PYTEST_ARGS)

test-sim: $(TEST_STAMP) ## Transport over a simulated network: SEEDS=10000 schedules of faults, and the mutations they must notice
	$(TEST_VENV)/bin/python -m tests.sim.transport --seeds 0:$(SEEDS) --json $(SIM_OUT)/seeds.json
	$(TEST_VENV)/bin/python -m tests.sim.transport --mutations --json $(SIM_OUT)/mutations.json

test-sim-cluster: $(TEST_STAMP) ## A cluster of pools over a simulated network: CLUSTER_SEEDS=5000, and the mutations they must notice
	$(TEST_VENV)/bin/python -m tests.sim.cluster --seeds 0:$(CLUSTER_SEEDS) --json $(SIM_OUT)/cluster-seeds.json
	$(TEST_VENV)/bin/python -m tests.sim.cluster --mutations --json $(SIM_OUT)/cluster-mutations.json

engines = KVPOOL_TEST_ENGINES=1 ENGINES_OUT="$(ENGINES_OUT)" $(VLLM_VENV)/bin/python -m pytest --confcutdir=tests/engines

test-faults: $(TEST_STAMP) ## Faults with real sockets in network namespaces; needs root; table, JSON (RUNS=2 ABORTS=10000 FAULTS_ARGS=)
	$(TEST_VENV)/bin/python -m tests.faults --runs $(RUNS) --aborts $(ABORTS) --json $(FAULTS_OUT) $(FAULTS_ARGS)

test-cluster: $(TEST_STAMP) ## Faults in a cluster of processes, in network namespaces; needs root; table, JSON (CLUSTER_ARGS="--quick --runs 2")
	$(TEST_VENV)/bin/python -m tests.cluster_faults --json $(CLUSTER_OUT) $(CLUSTER_ARGS)

test-engines: $(VLLM_STAMP) ## Real vLLM engines on the CPU, prefill and decode apart; table, JSON and plot in ENGINES_OUT
	$(engines) tests/engines $(PYTEST_ARGS)

test-engines-quick: $(VLLM_STAMP) ## Of those: vLLM's interface, and the hybrid model bit by bit
	$(engines) tests/engines/test_compat.py \
		"tests/engines/test_outputs.py::test_tokens_and_logprobs_are_those_of_one_engine[qwen3_next]" $(PYTEST_ARGS)

demo-real: $(TEST_STAMP) ## Real tiny models through the pool, bitwise (MODEL=kimi_linear for one)
	for model in $(or $(MODEL),$(MODELS)); do $(TEST_VENV)/bin/kvpool demo --real --model "$$model" $(DEMO_ARGS); done

bench: $(TEST_STAMP) ## Benchmarks; JSON in benchmarks/results/local (BENCH_JSON=path)
	@mkdir -p "$(dir $(BENCH_JSON))"
	$(TEST_VENV)/bin/python -m pytest benchmarks --benchmark-only --benchmark-json="$(BENCH_JSON)" -o timeout=600 $(PYTEST_ARGS)
	@echo "saved $(BENCH_JSON)"

lint: $(TEST_STAMP) ## ruff
	$(TEST_VENV)/bin/ruff check .

types: $(TEST_STAMP) ## mypy, strict
	$(TEST_VENV)/bin/mypy

test-native: $(TEST_STAMP) ## The extension under AddressSanitizer, its I/O engine under ThreadSanitizer
	VENV="$(abspath $(TEST_VENV))" bash native/test-asan.sh
	VENV="$(abspath $(TEST_VENV))" bash native/test-tsan.sh

$(TEST_VENV)/.fuzz: $(TEST_STAMP)
	$(TEST_VENV)/bin/python -m pip install $(PIP_FLAGS) -e '.[fuzz]'
	@touch $@

fuzz: $(TEST_VENV)/.fuzz ## Coverage-guided fuzzing, Python and C, FUZZ_SECONDS=60 for each target; needs clang (FUZZ_ARGS=)
	$(TEST_VENV)/bin/python tests/fuzz/fuzz_wire.py --seconds $(FUZZ_SECONDS)
	$(TEST_VENV)/bin/python tests/fuzz/run.py --seconds $(FUZZ_SECONDS) --findings $(FUZZ_FINDINGS) --json $(FUZZ_FINDINGS)/fuzz.json $(FUZZ_ARGS)

soak: $(TEST_STAMP) ## kvpoold at full load with churn, leases, kills: memory flat, nothing leaked, every read checked (SOAK_MINUTES=30)
	@mkdir -p "$(dir $(SOAK_JSON))"
	$(TEST_VENV)/bin/python -m tests.soak --minutes $(SOAK_MINUTES) --json "$(SOAK_JSON)"

clean: ## Remove what make built
	rm -rf $(DEMO_VENV) $(TEST_VENV) $(VLLM_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find kvtransport kvpool tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f kvtransport/_native*.so
