# Every target sets up what it needs in .venv; nothing has to be installed before, but Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEEDS ?= 0

.PHONY: demo demo-tokenizer demo-upt demo-mixture demo-audio demo-video test test-slow lint clean

demo: $(VENV)/.ready
	$(BIN)/mmpost demo --out runs/demo --seeds $(SEEDS)

demo-mixture: $(VENV)/.ready
	$(BIN)/python -m mmpost.cli.demo_mixture --out runs/demo-mixture

demo-upt: $(VENV)/.ready
	$(BIN)/mmpost demo-upt --out runs/demo-upt --seeds 0,1,2

demo-audio: $(VENV)/.ready-media
	$(BIN)/mmpost demo-audio --out runs/demo-audio --seeds 0,1,2

demo-video: $(VENV)/.ready-media
	$(BIN)/mmpost demo-video --out runs/demo-video --seeds $(SEEDS)

demo-tokenizer: $(VENV)/.ready-tokenizers
	$(BIN)/mmpost tokenizer demo --out runs/demo-tokenizer --seeds $(SEEDS)

# Files run side by side, each in one process; a process takes about 2 GB.
test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-slow: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("mmpost needs Python 3.11 or newer; set PYTHON=...") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.ready-media: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[media]"
	touch $@

$(VENV)/.ready-tokenizers: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[tokenizers]"
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs build dist
