# make demo    digits -> train -> corrupt -> infer -> evaluate -> preview, into demo/
# make test    everything that CI runs; pytest's closing line comes last
#
# Both make .venv first. PYTHON=/path/to/python3.12 chooses the interpreter.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One more than cores: they wait for processes of their own a quarter of the time.
SIDE_BY_SIDE = -n $$(( $$(nproc) + 1 )) --dist loadfile $(sort $(wildcard tests/test_*.py))

.DEFAULT_GOAL := help
.PHONY: help venv demo test quick lint format clean

help:
	@echo 'make demo     run the whole thing end to end on digits, into demo/ (minutes)'
	@echo 'make test     lint, types, and the whole test suite'
	@echo 'make quick    only the tests that neither start Ray nor take long'
	@echo 'make lint     ruff and mypy'
	@echo 'make format   rewrite the code in the house style'
	@echo 'make venv     make $(VENV) and install into it (the others do this by themselves)'
	@echo 'make clean    remove $(VENV), demo/ and the caches'

venv: $(STAMP)

# The first interpreter that runs, is a version we support, and can make a virtual environment.
$(STAMP): pyproject.toml constraints.txt
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  for python in $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11); do \
	    if "$$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1; then \
	      found="$$python"; break; \
	    fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo 'error: no Python 3.11, 3.12 or 3.13 with the venv module was found$(if $(PYTHON), at $(PYTHON))' >&2; \
	    echo 'hint: install one (on Debian and Ubuntu: apt install python3 python3-venv), or name it: make PYTHON=/path/to/python3.12' >&2; \
	    exit 2; \
	  fi; \
	  echo "making $(VENV) with $$("$$found" --version)"; \
	  "$$found" -m venv --clear $(VENV) || exit 1; \
	fi
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

demo: $(STAMP)
	$(BIN)/denoise-batch demo --out demo --overwrite

# What starts Ray waits for processes half of the time, but takes the cores itself: two at once.
test: lint
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/integration

quick: $(STAMP)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'not slow'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
