# make demo         pretrain on the built-in digits, results in runs/digits          ARGS="--arch vit_mini_patch4_16" for another model
# make test         run notebooks and tests, and check that notebooks and library agree
# make test-all     the same, and the slow notebooks and tests
# make test-oldest  run the core tests with the oldest versions in settings.ini, in .venv-oldest (slow: installs PyTorch again)
# make bench        benchmarks against plain formulations and other libraries: benchmarks/results.md
#                   ARGS="loss step --bs 4 --device cuda" for some of them, other sizes, or a GPU
# make docs         build the site in _site from the saved notebooks                 make docs-serve to read it at http://localhost:8000
# make notebooks    regenerate the library, the outputs of the notebooks and README.md
# All of them create .venv first, from settings.ini.

FITS   = import sys; sys.exit(sys.version_info < (3,11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do if $$p -c '$(FITS)' 2>/dev/null; then echo $$p; break; fi; done)
BIN     = .venv/bin
ONE     = OMP_NUM_THREADS=1
CORE    = $(patsubst %,tests/test_%.py,training methods resume evaluation monitors input images reference fuzz leaks fastai_tools)
# notebooks with cells that only test-all runs
SLOW    = $(shell grep -l '"\#| slow' nbs/*/*.ipynb | sed 's,.*/,,' | paste -sd'|')
.PHONY: demo test test-all test-oldest bench docs docs-serve notebooks clean

.venv/new:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found: install it, or pass make PYTHON=/path/to/python"; exit 1; }
	@echo "Creating .venv (PyTorch is large: this takes minutes, once)"
	$(PYTHON) -m venv .venv
	@touch $@

.venv/core: .venv/new settings.ini setup.py pyproject.toml
	$(BIN)/pip install --quiet --editable .
	@touch $@

# one call of pip; then all cores compile what it installed, as some files are templates that do not compile without a word
.venv/dev: .venv/new settings.ini setup.py pyproject.toml
	$(BIN)/pip install --quiet --no-compile --editable '.[dev]'
	@$(BIN)/python -m compileall -qq -j 0 .venv/lib || true
	@touch .venv/core $@

.venv/bench: .venv/core
	$(BIN)/pip install --quiet --editable '.[bench]' || echo "lightly could not be installed: the tables are written without it"
	@touch $@

.venv/docs: .venv/core
	$(BIN)/pip install --quiet --editable '.[docs]'
	@touch $@

demo: .venv/core
	$(BIN)/dino_train --overwrite $(ARGS)

test: .venv/dev
	$(ONE) $(BIN)/nbdev-test nbs --n-workers 2 --do-print
	$(ONE) $(BIN)/python -m pytest -q -rs -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" tests

test-all: test
	$(ONE) $(BIN)/nbdev-test nbs --n-workers 2 --flags slow --cell-timeout 7200 --file-re '^($(SLOW))$$'
	$(ONE) $(BIN)/python -m pytest -q -rs -m slow tests

.venv-oldest/core: settings.ini tools/oldest.py
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet $$($(PYTHON) tools/oldest.py) pytest pytest-xdist hypothesis psutil
	@touch $@

test-oldest: .venv-oldest/core
	$(ONE) PYTHONPATH=$(CURDIR) .venv-oldest/bin/python -m pytest -q -n 2 --dist loadfile -m "not slow" $(CORE)

bench: .venv/bench
	$(BIN)/python -m benchmarks $(ARGS)

docs: .venv/docs
	$(BIN)/python tools/docs.py

docs-serve: docs
	$(BIN)/python -m http.server --bind localhost --directory _site $(or $(PORT),8000)

notebooks: .venv/dev
	$(BIN)/nbdev-export
	$(ONE) $(BIN)/nbdev-test nbs --n-workers 2 --save
	$(ONE) $(BIN)/nbdev-test examples --save
	$(BIN)/python tools/nbtext.py tidy nbs/*.ipynb nbs/*/*.ipynb examples/*.ipynb
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-clean --fname examples
	$(BIN)/python tools/readme.py

clean:
	rm -rf .venv .venv-oldest runs build dist _site *.egg-info
