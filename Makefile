# make demo: the whole job on small made-up clips, with a report. make test: everything that must hold. make quick:
# what of it can be tried after every change. make wheel: the package as it is shipped, and one command of it outside of the
# checkout. make bench: what is measured against peers, into benchmarks/README.md. make dev: hooks that check each commit. Each
# sets up what it needs first.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
INSTALL := $(PIP) install -c constraints.txt
PYTHON_HERE := $(abspath $(BIN))/python

.PHONY: demo dev test quick wheel bench clean

demo: .venv/base
	$(BIN)/wanloom demo --out demo

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest

quick: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -m quick

# an editable install hides a file that the package forgets, and a wheel is what people get
wheel: .venv/base
	rm -rf build/wheel build/lib && mkdir -p build/wheel/installed build/wheel/away
	$(PIP) wheel --no-deps --wheel-dir build/wheel .
	$(PIP) install --no-deps --target build/wheel/installed build/wheel/wanloom-*.whl
	cd build/wheel/away && PYTHONPATH=$(CURDIR)/build/wheel/installed $(PYTHON_HERE) -m wanloom generate \
	  --frames 17 --height 64 --width 64 --steps 2 --prompt "A red circle moves to the left." --out made
	test -s build/wheel/away/made/*.mp4
	cd build/wheel/away && PYTHONPATH=$(CURDIR)/build/wheel/installed $(PYTHON_HERE) -c \
	  "import wanloom; assert '/build/wheel/installed/' in wanloom.__file__, wanloom.__file__"

dev: .venv/dev
	$(BIN)/pre-commit install

bench: .venv/dev
	$(BIN)/python -m benchmarks

# torch first and by its exact version: another package's range would bring the newest build and gigabytes of CUDA
.venv/base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	$(INSTALL) --editable .
	touch $@

.venv/dev: .venv/base
	$(INSTALL) --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build demo
