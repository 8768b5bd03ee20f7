# Undertow. `make figures` and `make test` are all a newcomer needs; both can be run again at will.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
OUT    ?= figures
SITE   ?= site
JOBS   ?= $(shell nproc 2>/dev/null || echo 1)

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup figures report test quick bench check types docs format clean

help:  ## what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 12

setup: $(STAMP)  ## the virtual environment with everything in it

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[vlm,pretrained,probes,notebooks,cluster,docs,dev]'
	@touch $(STAMP)

figures: $(STAMP)  ## every figure and claim, from the bundled models, and where they are
	$(BIN)/python -m experiments run all --out $(OUT) --jobs $(JOBS); status=$$?; \
	  $(BIN)/python -m experiments report --out $(OUT) && exit $$status

report: $(STAMP)  ## one HTML page from the figures that are there
	$(BIN)/python -m experiments report --out $(OUT)

test: $(STAMP)  ## the whole test suite
	$(BIN)/python -m pytest -n auto --dist loadfile --jaxtyping-packages=interp,probes,experiments,beartype.beartype

quick: $(STAMP)  ## the tests that take seconds
	$(BIN)/python -m pytest -n auto --dist loadfile -m 'not slow' --jaxtyping-packages=interp,probes,experiments,beartype.beartype

bench: $(STAMP)  ## speed against the peers, side by side (half an hour; needs a quiet machine)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[benchmarks]'
	$(BIN)/python -m benchmarks && $(BIN)/python -m benchmarks report

check: $(STAMP)  ## lint, layers, spelling
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/codespell

types: $(STAMP)  ## the types of interp and probes (pyright; fetches node once)
	$(BIN)/pyright

docs: $(STAMP)  ## the documentation, in site/; with figures, the gallery too
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir $(SITE)

format: $(STAMP)  ## sort imports and fix what can be fixed
	$(BIN)/ruff check --fix .

clean:  ## remove what the commands above made
	rm -rf $(OUT) $(SITE) .pytest_cache .hypothesis .ruff_cache build dist *.egg-info
