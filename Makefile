# One argument list for every target that takes one: make run ARGS="--framework selinux", make test ARGS="-k dac"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup run test test-all test-teeth soak mutants bench lint clean

help: ## list the targets
	@echo 'make TARGET [ARGS="..."]'
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | while IFS='	' read -r name what; do printf '  %-10s %s\n' "$$name" "$$what"; done

setup: ## install what is missing on this machine, and make .venv (does nothing when all is there)
	@scripts/setup.sh $(SETUP)

run: setup ## the flagship experiment: who stops nginx from reading /etc/shadow? (ARGS: options of lsmlab run)
	@.venv/bin/lsmlab run nginx-reads-shadow $(ARGS)

test test-all: SETUP = --tests

test: setup ## linters, unit tests and tests in real guests (ARGS: options of pytest)
	.venv/bin/python -m pytest --require=vm -m "not slow" $(ARGS)

test-all: setup ## the same, and the long runs
	.venv/bin/python -m pytest --require=vm $(ARGS)

test-teeth: setup ## known-bad pieces are put into the harness: the sabotage suite has to turn red for each; 5 minutes
	.venv/bin/python scripts/teeth.py

soak: setup ## 100 flagship runs with a random fault in each: no wrong verdict; 40 minutes (ARGS: options of scripts/soak.py)
	.venv/bin/python scripts/soak.py $(ARGS)

bench: setup ## how fast lsmlab is here: a table, and bench.json; 15 to 20 minutes (ARGS: options of scripts/bench.py)
	.venv/bin/python scripts/bench.py $(ARGS)

mutants: setup ## do the tests of verdicts notice a change of the code? 10 to 20 minutes (ARGS: names of mutmut's mutants)
	.venv/bin/python scripts/mutants.py $(ARGS)

lint: setup ## the linters alone; `make test` runs them too
	.venv/bin/python -m ruff check
	.venv/bin/python -m ruff format --check
	.venv/bin/python -m mypy

clean: ## remove .venv and the caches in this folder; built images live elsewhere and stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build/mutants
	find harness tests -type d -name __pycache__ -prune -exec rm -rf {} +
