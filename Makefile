# Every target runs from the root with .venv, which `make setup` makes and keeps up to date.
SHELL := /bin/bash
PYTHON := .venv/bin/python
SWEEP := runs/quickstart
# A file's tests stay in one process: what they share is made once.
PYTEST := $(PYTHON) -m pytest -n auto --maxprocesses 4 --dist loadfile
STARTED := $(shell date +%s)
GPU := $(shell nvidia-smi -L 2>/dev/null)

# $(call stage,TITLE,COMMAND) runs a command and prints how long it took.
stage = @started=$$(date +%s); printf '\n==> %s\n' '$(1)'; $(2) || exit $$?; \
	printf '==> %s: %s s\n' '$(1)' $$(( $$(date +%s) - started ))

.PHONY: help setup quickstart promote-quickstart test test-all check bench clean

help: ## list these targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## make .venv with everything in it; again, it finishes what is missing
	@python3 bootstrap.py

quickstart: setup ## nine trials on the demo model, report, promotion to GGUF, a chat answer
	$(call stage,sweep,$(PYTHON) -m sweeps.run sweeps/configs/quickstart.yaml)
	$(call stage,report,$(PYTHON) -m analysis.report $(SWEEP))
	$(call stage,promotion,$(MAKE) --no-print-directory promote-quickstart)
	$(call stage,chat,$(PYTHON) -m deploy.chat $(SWEEP) --prompt 'What does `math.sqrt` do in Python?')
	@echo "==> quickstart: $$(( $$(date +%s) - $(STARTED) )) s in all"

# A promoted version is never changed: make another only when a trial has ended since the last one.
promote-quickstart:
	@current=$(SWEEP)/promoted/current; \
	if [ -f $$current ] && [ -z "$$(find $(SWEEP)/trials -name result.json -newer $$current)" ]; then \
		echo "no trial has ended since $(SWEEP)/promoted/$$(cat $$current) was promoted"; \
	else \
		$(PYTHON) -m deploy.promote $(SWEEP) --quantization Q8_0 Q4_K_M; \
	fi

test: setup ## the tests, a process a core
	$(PYTEST)

test-all: setup ## all tests: slow, on the network and, where there is a GPU, on it
	$(PYTEST) -m '$(if $(GPU),,not gpu)'

check: setup ## format, lint, types, import rules, tests
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m pyright
	.venv/bin/lint-imports
	$(PYTEST)

bench: setup ## the benchmarks of minutes in benchmarks/; benchmarks.sweep takes hours and is a command of its own
	@found=; for file in benchmarks/[a-z]*.py; do \
		[ "$$file" != benchmarks/sweep.py ] && grep -qs __main__ "$$file" || continue; found=yes; echo "==> $$file"; \
		$(PYTHON) -m "benchmarks.$$(basename "$$file" .py)" || exit $$?; \
	done; [ -n "$$found" ] || echo "benchmarks/ holds none yet"

clean: ## remove .venv and tools' caches; never runs/
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -path ./runs -prune -o -name __pycache__ -type d -exec rm -rf {} +
