# Each target makes the environment it needs from pyproject.toml. On a bare machine python3 3.12 or later, with pip, is enough.
.PHONY: bench test test-all lint format clean
.DELETE_ON_ERROR:

VENV := .venv
NEWEST := .venv-newest
PIP := -m pip --quiet --disable-pip-version-check install --no-compile
WORKERS ?= 2
BENCH_ARGS ?=
TEST_ARGS ?=
# Each worker starts with one half of the tests in order, so what a file or a table shares is made once.
PYTEST := -m pytest -n $(WORKERS) --dist worksteal $(TEST_ARGS)

# pip compiles nothing ahead (that took 18 s of set-up), so every process keeps the bytecode of what it really imports.
export PYTHONDONTWRITEBYTECODE :=

bench: $(VENV)/.stamp-bench
	$(VENV)/bin/python -m jzero.bench $(BENCH_ARGS)

test test-all: export JAX_PLATFORMS := cpu
# Eight simulated devices wait for each other inside collectives; with a thread each, two steps in flight can deadlock (docs/log.md).
test test-all: export PJRT_NPROC := 64

test: lint
	$(VENV)/bin/python $(PYTEST) -m "not slow"

test-all: lint $(NEWEST)/.stamp-test
	$(VENV)/bin/python $(PYTEST)
	$(NEWEST)/bin/python $(PYTEST) -m "not slow"

lint: $(VENV)/.stamp-test
	$(VENV)/bin/ruff check --quiet .
	$(VENV)/bin/ruff format --quiet --check .
	$(VENV)/bin/pyrefly check --python-interpreter-path $(VENV)/bin/python --summary=none

format: $(VENV)/.stamp-test
	$(VENV)/bin/ruff check --quiet --fix .
	$(VENV)/bin/ruff format --quiet .

clean:
	rm -rf $(VENV) $(NEWEST)

# `make test` runs on the oldest versions that pyproject.toml allows, `make test-all` on the newest as well.
$(VENV)/floors.txt: pyproject.toml | $(VENV)/bin/python
	@$(VENV)/bin/python -c '\
	import tomllib; \
	project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	extras = project["optional-dependencies"]; \
	floors = project["dependencies"] + extras["plot"] + extras["train"] + extras["compile"]; \
	print(*(floor.replace(">=", "==") for floor in floors if ">=" in floor), sep="\n")' > $@

$(VENV)/.stamp-bench: $(VENV)/floors.txt
	@echo "installing jzero into $(VENV)"
	$(VENV)/bin/python $(PIP) -c $(VENV)/floors.txt -e '.[plot]'
	@touch $@

$(VENV)/.stamp-test: $(VENV)/floors.txt
	@echo "installing jzero, its tests and the TPU and CUDA compilers into $(VENV)"
	$(VENV)/bin/python $(PIP) -c $(VENV)/floors.txt -e '.[test,compile]'
	@touch $@ $(VENV)/.stamp-bench

$(NEWEST)/.stamp-test: pyproject.toml | $(NEWEST)/bin/python
	@echo "installing the newest versions into $(NEWEST)"
	$(NEWEST)/bin/python $(PIP) --upgrade -e '.[test,compile]'
	@touch $@

%/bin/python:
	@for python in python3 python3.12 python3.13 python3.14; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then $$python -m venv $*; exit; fi; \
	done; \
	echo "jzero needs Python 3.12 or later (JAX 0.11 does): python3 is $$(python3 --version 2>&1), and no python3.12 was found" >&2; \
	echo "install Python 3.12, or put it on PATH as python3 or python3.12" >&2; exit 1
