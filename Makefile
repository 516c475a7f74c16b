# `make chat` and `make test` each set up what they need. Nothing outside .venv and the user's cache and
# data folders is written.

PYTHON ?= python3
ACCEL ?=
ARGS ?=
PROMPT ?=
STARTER := smollm2
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup model chat prompt-given run test check static bench bars clean
# The order inside `make clean setup` and of the parts of `test` is meant.
.NOTPARALLEL:

# Taken as they were typed: quotes, dollars and backticks of a prompt are not make's or the shell's.
export EDGEINFER_MAKE_PROMPT := $(value PROMPT)
export EDGEINFER_MAKE_ACCEL := $(value ACCEL)

help:  ## Print the targets
	@echo 'make TARGET, where TARGET is'
	@sed -n 's/^\([a-z]*\):[^#]*##  *\(.*\)/  \1\t\2/p' Makefile | expand -t 12
	@echo
	@echo 'ARGS="…" adds options to chat, run, bench and bars; PYTHON=python3.12 and ACCEL=cuda|vulkan|metal are for setup.'

setup:  ## Make .venv with everything that runs here (compiles llama.cpp once, about 5 minutes)
	@command -v "$(PYTHON)" >/dev/null || { echo 'setup: there is no $(PYTHON); install Python 3.11 or newer, or name one: make PYTHON=python3.12 …' >&2; exit 1; }
	@"$(PYTHON)" -m scripts.setup_environment --accel "$$EDGEINFER_MAKE_ACCEL"

model: setup
	@$(BIN)/edgeinfer models pull $(STARTER)

chat: model  ## Chat in the terminal (the model used last, else the starter)
	@$(BIN)/edgeinfer chat $(ARGS)

prompt-given:
	@test -n "$$EDGEINFER_MAKE_PROMPT" || { echo 'make run needs a prompt: make run PROMPT="Why is the sky blue?"' >&2; exit 2; }

run: prompt-given model  ## One answer: make run PROMPT="Why is the sky blue?"
	@$(BIN)/edgeinfer run $(ARGS) -- "$$EDGEINFER_MAKE_PROMPT"

test: setup static model  ## Set up, check, and run all tests
	@$(BIN)/python -m pytest

check: setup static  ## Format, lint, types, import rules, fast tests
	@$(BIN)/python -m pytest -q -m "not slow and not model"

static: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: model  ## Measure how fast the starter answers here
	@$(BIN)/edgeinfer bench $(STARTER) $(ARGS)

bars: model  ## Measure against llama.cpp's own tools (builds them once, about 10 minutes)
	@$(BIN)/python -m benchmarks $(ARGS)

clean:  ## Remove .venv and build leftovers; models and caches of the user stay
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
