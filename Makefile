# `make demo` and `make test` do all of their own set-up. They need make, git, Python 3.10 or newer with its venv module,
# and a package index; about 6 GB of disk, most of it PyTorch's CUDA libraries, which the package index's builds bring along.
#
#   make demo PYTHON=python3.12     another interpreter (for a new .venv)

PYTHON  ?= python3
WORKERS ?= 2
VENV    := .venv
PY      := $(VENV)/bin/python
STAMP   := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow format format-check lint types arch wheel-check lock clean install

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "make %-13s %s\n", $$1, $$2}'

demo: $(STAMP)  ## Run MOS on real handwritten digits; write a results folder with an HTML report
	@out=runs/demo-$$(date +%Y%m%d-%H%M%S); \
	$(VENV)/bin/cl-adapters run --benchmark digits --strategy mos --out "$$out" && \
	printf '\nResults: %s\nReport:  %s\n' "$$out" "$$(pwd)/$$out/report.html"

test: $(STAMP)  ## Run the tests
	$(PY) -m pytest -n $(WORKERS)

test-slow: $(STAMP)  ## Run the tests that take minutes
	$(PY) -m pytest -n $(WORKERS) -m slow

format: $(STAMP)  ## Put the code into its one format
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

format-check: $(STAMP)  ## Check the format
	$(PY) -m ruff format --check .

lint: $(STAMP)  ## Check style and docstrings
	$(PY) -m ruff check .

types: $(STAMP)  ## Check the types
	$(PY) -m mypy

arch: $(STAMP)  ## Check that imports go downwards only
	$(VENV)/bin/lint-imports

wheel-check: $(STAMP)  ## Build the wheel, install it into an empty environment, use it there
	PY=$(abspath $(PY)) bash .ci/wheel-check

install: $(STAMP)  ## Make .venv: the locked set of packages, and this project editable

# Made again when the lock or pyproject.toml changes. --no-deps: the lock is complete, so nothing unpinned can come in.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "error: cl-adapters needs Python 3.10 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)."; \
	  echo "       Install a newer one, or name it: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; } >&2
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: this Python cannot make virtual environments. On Debian and Ubuntu:"; \
	  echo "       sudo apt install python3-venv"; exit 1; } >&2
	@test -x $(PY) || echo "Making $(VENV) and installing the packages of requirements.lock; a few minutes the first time."
	@test -x $(PY) && $(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check --no-deps -r requirements.lock
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

UV ?= uv
lock:  ## Resolve requirements.lock anew for Python 3.10 and newer (needs uv: pip install uv)
	$(UV) pip compile pyproject.toml --universal --python-version 3.10 --all-extras --upgrade \
	  --no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock' --output-file requirements.lock

clean:  ## Remove the environment and everything built (not runs/)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find cl_adapters strategies benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
