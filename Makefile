# One command each: `make demo` runs the main job, `make test` the tests, in PROCESSES processes. Both set everything up
# themselves.
# Other versions, each in an environment of its own: `make test TORCH=2.6.0 PYTHON=python3.12 WITH="transformers==4.57.6"`.
PYTHON ?= python3
TORCH ?= 2.13.0
WITH ?=
PROCESSES ?= 2
CHOSEN := $(filter command,$(origin TORCH) $(origin PYTHON) $(origin WITH))
VENV := .venv$(if $(CHOSEN),-$(shell echo $(notdir $(PYTHON)) $(TORCH) $(WITH) | tr -cs 'A-Za-z0-9.\n' '-'))
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
PINNED := $(if $(CHOSEN),,-c constraints.txt)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# other libraries, which pages and tests run beside this one
PEERS := laplace-torch asdfghjkl==0.1a4 backpack-for-pytorch curvlinops-for-pytorch nngeometry kronfluence

# a Python and a torch each, for `make test-versions`
PAIRS ?= python3.10:2.6.0 python3.11:2.13.0 python3.12:2.14.1 python3.13:2.14.1

.PHONY: setup demo test test-slow test-versions check docs bench bench-large gpu reproduce reproduce-quick clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(PINNED) torch==$(TORCH)
	$(PIP) $(PINNED) -e '.[plot,examples,docs,test,check,peers]' torch==$(TORCH) $(WITH)
	$(PIP) $(PINNED) --no-deps $(PEERS)
	rm -f $(VENV)/.ready-* && touch $@

demo: setup
	$(BIN)/python examples/fisher_of_digits.py

test: setup
	$(BIN)/python -m pytest -m "not slow" -n $(PROCESSES)

test-slow: setup
	$(BIN)/python -m pytest -m slow -n $(PROCESSES) -o timeout=7200

# every pair in an environment of its own (some GB each); all are run, and those that failed are named at the end
test-versions:
	@failed=; for pair in $(PAIRS); do python=$${pair%%:*}; \
	$$python -c '' 2> /dev/null || { echo "$$pair left out: $$python is not installed"; continue; }; \
	$(MAKE) test PYTHON=$$python TORCH=$${pair##*:} || failed="$$failed $$pair"; done; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

check: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/basedpyright -p tests/typing --pythonpath $(BIN)/python
	GALLERY=shown $(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/checked

docs: setup
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

bench: setup
	$(BIN)/python -m benchmarks $(ARGS)

bench-large: setup
	$(BIN)/python -m benchmarks.large $(ARGS)

gpu: setup
	$(BIN)/python -m benchmarks.device --docs docs/benchmarks.md $(ARGS)

reproduce: setup
	$(BIN)/python examples/reproduce.py

reproduce-quick: setup
	$(BIN)/python examples/reproduce.py --quick

clean:
	rm -rf $(VENV) docs/_build docs/how_to docs/objects docs/sg_execution_times.rst out
