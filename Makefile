# make demo: the whole job on small made-up clips, with a report. make test: everything that must hold. make bench: what is
# measured against peers, into benchmarks/README.md. Each sets up what it needs first.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test bench clean

demo: .venv/base
	$(BIN)/wanloom demo --out demo

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest

bench: .venv/dev
	$(BIN)/python -m benchmarks

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
