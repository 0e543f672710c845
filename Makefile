# make demo   compare the guide families on the digits; what comes out is in runs/digits
# make test   the whole test suite
# make lint   style, format and types
# make bench  what a training step costs, against Pyro's, NumPyro's and hand-written PyTorch's
# make clean  remove all that the targets above made, except runs/
#
# The first of them makes .venv and installs the package and its pinned dependencies there.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
METADATA := setup.cfg pyproject.toml constraints.txt

.PHONY: demo test lint bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/python -m pyro_vi compare --data digits --out runs/digits --overwrite

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# Only an installed wheel has models/ and guides/ where Python sees them, inside pyro_vi, so mypy
# reads one: from within its folder, where the repository's own pyro_vi/ can't stand in for it.
# build/ goes first, because setuptools would pack what an earlier build left there.
lint: $(VENV)/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/mypy .
	cd build/mypy && ../../$(BIN)/mypy --config-file ../../pyproject.toml \
		--cache-dir ../../.mypy_cache -p pyro_vi

bench: $(VENV)/installed-bench
	$(BIN)/python benchmarks/svi_step.py
	$(BIN)/python benchmarks/svi_step.py --first
	$(BIN)/python benchmarks/svi_step.py --growth
	$(BIN)/python benchmarks/svi_step.py --bounds
	$(BIN)/python benchmarks/ddpm_step.py --compile

clean:
	rm -rf $(VENV) build dist pyro_vi.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The installs are editable, so that a changed source file needs no new one; the stamps are older
# than the metadata when the dependencies may have changed. A plain install would not do here:
# `python -m` puts the current folder first, and ./pyro_vi has no models and guides inside.
$(VENV)/installed: $(METADATA) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-%: $(METADATA) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "pyro_vi needs Python 3.11 or later; $(PYTHON) is `$(PYTHON) --version 2>&1`." >&2; \
		echo "Name another: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
