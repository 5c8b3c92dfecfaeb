# `make repro` and `make test` do everything from nothing; the rest is listed by `make help`.
SHELL := bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export DVC_NO_ANALYTICS := 1
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS := 120
export PREFECT_HOME ?= $(CURDIR)/.prefect
export PREFECT_SERVER_API_PORT ?= 4200
export TVE_RETRAIN_CRON ?= 0 2 * * *
export TVE_AUDIT_CRON ?= 0 6 * * *
export TVE_TIMEZONE ?= UTC
# Where Python may not keep what it compiles, as in many images, every stage would compile torch anew: 8 s on one core.
COMPILED := $(if $(PYTHONDONTWRITEBYTECODE),--compile-bytecode)
FLOWS_URL := http://127.0.0.1:$(PREFECT_SERVER_API_PORT)/api

.PHONY: help venv repro test lint types profile flow server worker graph lock proof bench audit goals-engine goals-evaluation goals-lineage goals-main clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 14

venv: $(READY) ## the virtual environment, with the versions of requirements.lock

$(READY): requirements.lock pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	test -x $(VENV)/bin/uv || $(VENV)/bin/python -m pip install --quiet uv
	VIRTUAL_ENV=$(CURDIR)/$(VENV) uv pip sync --quiet --require-hashes $(COMPILED) requirements.lock
	VIRTUAL_ENV=$(CURDIR)/$(VENV) uv pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

repro: $(READY) ## the whole job of the active profile; does only what is stale
	dvc repro

flow: $(READY) ## the same as a Prefect flow, a task per stage; FLOW=retrain, audit or sweep: another flow
	python -m tve_pipeline.flows $(FLOW)

server: $(READY) ## Prefect's server and UI, on the loopback address
	PREFECT_API_URL=$(FLOWS_URL) PREFECT_SERVER_UI_API_URL=$(FLOWS_URL) \
	PREFECT_SERVER_CORS_ALLOWED_ORIGINS=$(FLOWS_URL:/api=),http://localhost:$(PREFECT_SERVER_API_PORT) \
	prefect server start --host 127.0.0.1

worker: export TVE_ROOT ?= $(CURDIR)
worker: export PREFECT_API_URL ?= $(FLOWS_URL)
worker: $(READY) ## deploys prefect.yaml to the server, and runs what is scheduled or asked for
	prefect work-pool inspect tve >/dev/null 2>&1 || prefect work-pool create tve --type process
	prefect --no-prompt deploy --all
	prefect worker start --pool tve

test: $(READY) ## all tests
	pytest

lint: $(READY) ## ruff, and whether dvc.yaml lists the code that its stages import
	ruff check .
	ruff format --check --diff .

types: $(READY) ## mypy, strict
	mypy

profile: ## make another profile the active one: make profile NAME=real
	@sh profiles/switch.sh "$(NAME)"

graph: $(READY) ## write the code that each stage imports into dvc.yaml
	python -m tve_pipeline.graph

lock: $(READY) ## renew requirements.lock from pyproject.toml
	uv pip compile pyproject.toml --extra pipeline --extra dev --universal --python-version 3.11 --generate-hashes \
	  --no-header --no-emit-index-url --no-emit-find-links --no-annotate -q -o requirements.lock

audit: $(READY) ## recompute every hash of the active profile, back to the source pictures
	tve audit

proof: $(READY) ## compile every kernel for four GPU architectures, without a GPU; spills are errors
	env -u TRITON_INTERPRET python -m tve_kernels.compile_proof

bench: $(READY) ## time the coalition engine beside plain PyTorch; appends rows to kernels/results
	python -m benchmarks.engine

goals-engine: $(READY) ## measure what the coalition engine promises; about 45 minutes on two cores
	python -m benchmarks.goals

goals-evaluation: $(READY) ## measure how faithful TVE is beside other methods, on 50 pictures; FULL=1: on all
	python -m tve_pipeline.goals_evaluation $(if $(FULL),--full)

goals-lineage: $(READY) ## measure what audit and flows promise: tampering, speed, overhead, faults, scheduled retraining; an hour
	python -m tve_pipeline.goals_lineage

goals-main: $(READY) ## measure what the main job promises: clones, installs, runs everything, so as long as `make repro` takes
	python -m tve_pipeline.goals main

clean: ## remove what the pipeline made (not DVC's cache, from which `dvc checkout` restores it) and tools' caches
	rm -rf data models results .tve .prefect .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
