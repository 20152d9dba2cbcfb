# make demo: the whole job on small made-up clips, with a report. make test: everything that must hold. Both set up first.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test clean

demo: .venv/base
	$(BIN)/wanloom demo --out demo

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest

# torch first and by its exact version: another package's range would bring the newest build and gigabytes of CUDA
.venv/base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) --editable .
	touch $@

.venv/dev: .venv/base
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build demo
