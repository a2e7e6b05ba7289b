# Every target sets itself up in .venv; nothing is installed again until pyproject.toml or
# constraints.txt changes.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input \
	--root-user-action=ignore -c constraints.txt

# The package alone, and with what tests and checks need.
RUN := $(VENV)/.installed-run
DEV := $(VENV)/.installed-dev

CODE := cropkt server/cropkt_server client/cropkt_client sim/cropkt_sim docs/cropkt_docs

FUZZ ?= 100000

export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export RAY_USAGE_STATS_ENABLED := 0

.DELETE_ON_ERROR:
.PHONY: help demo test test-ray test-federation test-browser test-docs docs fuzz nightly lint types \
	wheel bench clean

help:
	@echo "make demo             run a small synthetic study; the report lands in demo-out/"
	@echo "make test             lint, types and all tests but those of the next four"
	@echo "make test-ray         tests that start Ray inside the test process"
	@echo "make test-federation  tests that start real coordinator and hospital processes"
	@echo "make test-browser     the live board in the Chromium of this machine"
	@echo "make test-docs        the longer commands of README and docs, as they are printed there"
	@echo "make docs             write docs/reference/ anew from the code"
	@echo "make fuzz             100,000 hostile inputs to the parsers, and again with atheris"
	@echo "make nightly          all that make test leaves out: fuzz, federation, Ray, docs, browser"
	@echo "make lint             ruff and import-linter"
	@echo "make types            mypy"
	@echo "make wheel            build dist/*.whl and check what is in it"
	@echo "make bench            run benchmarks/bench_*.py"
	@echo "make clean            remove what the other targets made, .venv too"

demo: $(RUN)
	$(BIN)/cropkt-sim run --preset demo --out demo-out

test: lint types
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile \
		-m "not federation and not ray and not docs and not browser"

test-ray: $(DEV)
	$(BIN)/python -m pytest -m ray

test-federation: $(DEV)
	$(BIN)/python -m pytest -m federation

test-browser: $(DEV)
	@$(PIP) -e ".[browser]"
	$(BIN)/python -m pytest -m browser

test-docs: $(DEV)
	$(BIN)/python -m pytest -m docs

docs: $(DEV)
	PYTHONPATH=docs $(BIN)/python -m cropkt_docs

fuzz: $(DEV)
	CROPKT_FUZZ=$(FUZZ) $(BIN)/python -m pytest --timeout 7200 tests/fuzz
	@$(PIP) -e ".[fuzz]"
	$(BIN)/python tests/fuzz/guided.py -atheris_runs=$(FUZZ)

nightly: fuzz test-ray test-docs test-browser test-federation

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: $(DEV)
	$(BIN)/mypy $(CODE) benchmarks

wheel: $(DEV)
	rm -rf dist
	$(BIN)/python -m build --wheel --no-isolation
	$(BIN)/check-wheel-contents dist

bench: $(DEV)
	set -e; for script in benchmarks/bench_*.py; do $(BIN)/python "$$script"; done

clean:
	rm -rf $(VENV) dist build demo-out bench-out practice \
		.hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find $(CODE) tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "cropkt needs Python 3.11 or later: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(RUN): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing cropkt into $(VENV) (the first time takes a few minutes)"
	@$(PIP) -e .
	@touch $@

$(DEV): $(RUN)
	@echo "installing the test tools and Ray into $(VENV)"
	@$(PIP) -e ".[dev,ray]"
	@touch $@
