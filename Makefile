# `make help` lists the targets. Everything runs in a virtual environment outside the checkout.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

export PYTHONDONTWRITEBYTECODE := 1
export PYTHONPATH := $(CURDIR)

BIN = $(shell scripts/setup.sh --where)/bin
PYTEST = $(BIN)/python -m pytest -p no:cacheprovider
# Where setup.sh and the tests keep what they make once. Root's tests must find what the user's tests have built.
CACHE = $(patsubst %/,%,$(dir $(shell scripts/setup.sh --where)))
# Network namespaces need root; the rest does not.
ifeq ($(shell id -u),0)
ROOT =
ROOTLY = @true
else
ROOT = sudo env PATH="$$PATH" PYTHONPATH="$$PYTHONPATH" PYTHONDONTWRITEBYTECODE=1 CI="$${CI:-}" \
	OVSMESH_CACHE="$(CACHE)" KUBEBUILDER_ASSETS="$${KUBEBUILDER_ASSETS:-}"
ROOTLY = @command -v sudo >/dev/null || { echo 'make: this part makes network namespaces: run it as root, or install sudo' >&2; exit 1; }; \
	echo 'make: not root, and this part makes network namespaces: using sudo' >&2
endif

.PHONY: help demo test test-unit test-browser test-fresh test-kube test-lab test-docker test-e2e test-kernel image bench docs lint setup setup-dev dist constraints clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: setup ## five hosts in network namespaces: ping matrix, live faults, repair times (root)
	$(ROOTLY)
	$(ROOT) $(BIN)/python -m ovsmesh lab demo

test: setup-dev lint test-unit test-browser test-fresh test-kube test-lab test-docker test-kernel test-e2e ## everything: lint, types, contracts, and all tests (root for the lab)

test-unit: setup-dev ## tests that carry no marker: they need nothing of the machine
	$(PYTEST) -n 2 -m 'not (root or network or lab or docker or browser or kube or kernel or e2e)'

test-browser: setup-dev ## the agent's page in a real, headless Chromium
	$(PYTEST) -m 'browser and not lab' tests/browser

# What such a machine can't carry runs in the other parts: the control plane and kubelets, which are built with a newer Go
# than Debian has, and the tests in User-mode Linux.
SUITES ?= trixie
PARTS ?= test-unit
test-fresh: setup-dev ## PARTS=test-unit in a fresh clone on a machine that holds nothing: SUITES='bookworm trixie' (root)
	$(ROOTLY)
	@for suite in $(SUITES); do $(ROOT) $(BIN)/python scripts/fresh_root.py $$suite $(PARTS); done

# The control plane is built first, before any test's time runs. Three tests at once, since they wait most of the time;
# then those with a lab, one at a time.
test-kube: setup-dev ## tests on a real Kubernetes control plane, built once with Go (10 minutes; root for some)
	@$(BIN)/python tests/support/binaries.py --ahead
	$(ROOTLY)
	$(ROOT) $(PYTEST) -n 3 -m 'kube and not lab' tests/kube
	$(ROOT) $(PYTEST) -m 'kube and lab' tests/kube

test-lab: setup-dev ## tests on real Open vSwitch in network namespaces (root)
	$(ROOTLY)
	$(ROOT) $(PYTEST) -n 3 --dist loadfile -m '(lab or root) and not (kube or docker)'

# Four at once, one a version: they wait most of the time, for what is to give no answer.
test-docker: setup-dev ## Docker of four versions on kbr0, each compared with itself on docker0 (root; Go for the first run)
	@$(BIN)/python tests/support/binaries.py --ahead --docker
	$(ROOTLY)
	$(ROOT) $(PYTEST) -n 4 --dist loadfile -m docker tests/docker

test-kernel: setup-dev ## tests on the kernel datapath, inside User-mode Linux (no root needed)
	$(PYTEST) -m kernel tests/kernel

test-e2e: setup-dev ## the image and the manifests on real kubelets with real containers (root)
	@$(BIN)/python tests/support/binaries.py --ahead --all
	$(ROOTLY)
	$(ROOT) $(PYTEST) -m e2e tests/e2e

BASE ?= debian:12-slim
TAG ?= ovsmesh:dev
TOOL ?=
image: ## the container image, by docker, podman or buildah: BASE=debian:12-slim TAG=ovsmesh:dev
	@scripts/image.sh '$(BASE)' '$(TAG)' $(TOOL)

bench: setup-dev ## the figures that README shows, as a table and as JSON (root)
	$(ROOTLY)
	$(ROOT) $(BIN)/python scripts/bench.py

docs: setup-dev ## the documents that are made from the code: docs/cli.md, docs/crds.md, docs/metrics.md
	$(BIN)/python -m tests.support.generated_docs

lint: setup-dev ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

setup:
	@scripts/setup.sh

setup-dev:
	@scripts/setup.sh --dev

dist: setup ## dist/: bootstrap.sh and the wheels that it needs on a host that reaches no package index
	rm -rf build dist
	$(BIN)/python -m venv build/venv
	scripts/pip.sh build/venv wheel --wheel-dir dist/wheels
	cp scripts/bootstrap.sh scripts/ovsmesh-agent.service dist/

constraints: ## constraints.txt: the versions and hashes of all libraries, for bootstrap.sh, make dist and the image
	scripts/constraints.sh

clean: ## removes caches and build results of this checkout
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
