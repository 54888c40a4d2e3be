# A fresh machine needs only `make demo` or `make test`: both install what is missing first.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' smallcap/__init__.py)
# The tests of a file run in one process, as do all on the session's Ray: see tests/conftest.py.
PARALLEL := --numprocesses=auto --maxprocesses=4

.PHONY: help setup demo test test-all chaos lint format audit docs site build release bench demo-model claims notebook transcripts clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(INSTALLED) ## Install smallcap and its tools into .venv (several GB on Linux: torch's CUDA wheels)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "smallcap needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=24.1'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED) ## Build the demo's index and caption its scenes, below out/demo/
	$(BIN)/smallcap demo

test: $(INSTALLED) ## Run all tests except the slow ones
	$(BIN)/python -m pytest -m 'not slow' $(PARALLEL)

test-all: $(INSTALLED) ## Run all tests
	$(BIN)/python -m pytest $(PARALLEL)

chaos: $(INSTALLED) ## Disturb jobs on a cluster of several nodes by seeded schedules (docs/reliability.md)
	$(BIN)/python -m tests.chaos

lint: $(INSTALLED) ## Check style, types and layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED) ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

audit: $(INSTALLED) ## Look for known vulnerabilities in the packages of constraints.txt (asks the Python Package Index)
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

docs: $(INSTALLED) ## Write docs/options.md from the declarations of the options
	$(BIN)/python -m jobs.options > docs/options.md

# With --quiet mkdocs would count no warnings, and --strict would find nothing.
site: $(INSTALLED) ## Build the documentation as a site in out/site/; a broken link or anchor fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

build: $(INSTALLED) ## Build the sdist and the wheel into dist/, check them, install the wheel elsewhere and run it
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist
	$(BIN)/twine check --strict dist/*
	SMALLCAP_DIST=dist $(BIN)/python -m pytest tests/test_wheel.py

release: ## Build and check what is committed, and tag it with the version in smallcap/__init__.py
	@git diff --quiet HEAD || { echo "Commit or stash your changes first: a release is what is committed."; exit 1; }
	@! git rev-parse --quiet --verify refs/tags/v$(VERSION) || { echo "v$(VERSION) is tagged: raise the version in smallcap/__init__.py."; exit 1; }
	@grep -q '^## $(VERSION)' CHANGELOG.md || { echo "CHANGELOG.md has no heading \"## $(VERSION)\"."; exit 1; }
	.ci/run
	$(MAKE) build
	git tag --annotate v$(VERSION) --message 'smallcap $(VERSION)'
	@echo "Tagged v$(VERSION). Publish it with: git push origin v$(VERSION) && $(BIN)/twine upload dist/*"

bench: $(INSTALLED) ## Measure every stage on this machine
	$(BIN)/smallcap bench

demo-model: $(INSTALLED) ## Make the demo's world and model again (needs fonts-noto-color-emoji)
	$(BIN)/python -m demo.make

claims: $(INSTALLED) ## Measure the paper's claims on the demo world (trains variants; run demo-model first)
	$(BIN)/python -m demo.claims

notebook: $(INSTALLED) ## Execute docs/notebook.ipynb, and store what its cells show
	$(BIN)/python -m demo.notebook

transcripts: $(INSTALLED) ## Run the commands of docs/transcripts.md, and put what they print into it
	$(BIN)/python -m demo.transcripts

clean: ## Remove the files that the demo and the tools wrote
	rm -rf out dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
