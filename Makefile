# One command each: `make demo` runs the main job, `make test` the tests. Both set everything up themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

# other libraries, which pages and tests run beside this one
PEERS := laplace-torch backpack-for-pytorch curvlinops-for-pytorch nngeometry kronfluence

.PHONY: setup demo test test-slow check docs bench bench-large reproduce clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[plot,examples,docs,test,check,peers]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps $(PEERS)
	rm -f $(VENV)/.ready-* && touch $@

demo: setup
	$(BIN)/python examples/fisher_of_digits.py

test: setup
	$(BIN)/python -m pytest -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -m slow -o timeout=7200

check: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/basedpyright -p tests/typing --pythonpath $(BIN)/python
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html

docs: setup
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

bench: setup
	$(BIN)/python -m benchmarks $(ARGS)

bench-large: setup
	$(BIN)/python -m benchmarks.large $(ARGS)

reproduce: setup
	$(BIN)/python -m examples.reproduce

clean:
	rm -rf $(VENV) docs/_build out
