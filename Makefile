# `make demo` and `make test` need nothing but Python 3.11 or newer with pip: each sets up in .venv what it needs.

VENV := .venv
BIN := $(VENV)/bin
# What is installed: for the demo, and on top of it for everything else.
DEMO_READY := $(VENV)/.ready-demo
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# The first new enough Python on the path; `make PYTHON=/path/to/python` names another.
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python; do \
	$$p $(NEW_ENOUGH) 2>/dev/null && echo $$p && break; done)

# Tensors of tests are tiny: threads would only wait for each other, and for the other processes.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PARALLEL := -n logical --maxprocesses 4 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test quick slow conformance gpu docs gallery lint format clean

help: ## Show this list
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/make \1	\2/p' Makefile | expand -t 20

demo: $(DEMO_READY) ## Train a small model under the monitor and show what it finds
	@$(BIN)/dynamon demo

test: lint ## Check the style, then run the tests, as many at once as there are processors
	@$(PYTEST) $(PARALLEL)

quick: $(READY) ## Run the short tests of the two lower floors
	@$(PYTEST) $(PARALLEL) -m "not slow and not long and not processes" tests/kernels tests/dynamon

slow: $(READY) ## Run the tests that take minutes, the browser, the wheel and the documentation among them
	@$(PYTEST) -m slow --timeout 3600

conformance: $(READY) ## Run every callback in every set-up on every model, and write docs/conformance.md
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.conformance

gpu: $(READY) ## Check everything that a GPU must show, in at most eight minutes; ARGS="--help" lists choices
	@$(BIN)/python -m tests.gpu $(ARGS)

docs: $(READY) ## Build the documentation into site/, warnings are errors
	@OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -q -b html docs site
	@echo "site/index.html"

gallery: $(READY) ## Run the examples and record what they print and draw for the documentation
	@$(BIN)/python docs/record.py

lint: $(READY) ## Check style and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(READY) ## Apply the style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## Remove .venv, caches and build products
	@rm -rf $(VENV) build dist site docs/generated docs/gallery/[a-z]*_*.md htmlcov .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each is made again only when the package table or a pinned version changes.
# Debian's Python comes without ensurepip; there pip installs itself from outside.
$(DEMO_READY): pyproject.toml constraints.txt
	@$(or $(PYTHON),false) $(NEW_ENOUGH) 2>/dev/null || { echo >&2 "dynamon needs Python 3.11 or newer," \
	"which $(or $(PYTHON),the Python on this path) is not: name one with 'make PYTHON=/path/to/python3.11'."; exit 1; }
	@echo "Setting up $(VENV), a few minutes the first time ..."
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { $(PYTHON) -m venv --without-pip $(VENV) && \
	$(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	@$(PIP) -e ".[demo]"
	@touch $@

$(READY): $(DEMO_READY)
	@echo "Installing what tests and documentation need ..."
	@$(PIP) -e ".[demo,docs,test]"
	@touch $@
