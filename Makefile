# `make demo` and `make test` set up an environment of their own in $(VENV) and need nothing but Python 3.10 or newer.
PYTHON ?= python3
VENV ?= .venv
# Another version of Transformers is chosen like this: make test VENV=.venv-tf4 TRANSFORMERS="transformers==4.57.*"
TRANSFORMERS ?= transformers
# These two work together. torchaudio declares no torch requirement, so a freely chosen torch may break it.
TORCH ?= torch==2.14.* torchaudio==2.11.*

INSTALLED = $(VENV)/.installed

demo: $(INSTALLED)
	@echo "Looking for the pretrained weights ..."
	$(VENV)/bin/python -m bat_tiny.demo

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest $(ARGS)

fast: $(INSTALLED)
	$(VENV)/bin/python -m pytest -m "not slow"

matrix: $(INSTALLED)
	$(VENV)/bin/python -m tox run

# A part of the benchmarks is run like this: make bench ARGS="--only encoder --rounds 3"
bench: $(INSTALLED)
	$(VENV)/bin/python -m benchmarks $(ARGS)

lint: $(INSTALLED)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

$(INSTALLED): pyproject.toml
	@echo "Installing torch and the rest into $(VENV): a few minutes, about 7 GB ..."
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet uv
	$(VENV)/bin/uv pip install --quiet --compile-bytecode --python $(VENV)/bin/python --editable ".[dev]" "$(TRANSFORMERS)" $(TORCH)
	touch $@

.PHONY: demo test fast matrix bench lint
