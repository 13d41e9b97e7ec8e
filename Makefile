# Everything here makes its own environment first (.venv, CPU build of torch; `make TORCH=cuda demo` for CUDA).
PYTHON ?= python3
TORCH ?= cpu
RUN := .venv/bin/python

.PHONY: demo test quality format env clean

demo: env
	@$(RUN) examples/demo.py

test: env
	@$(RUN) -m pytest

quality: env
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m pyright

format: env
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

env:
	@$(PYTHON) scripts/bootstrap.py --torch $(TORCH)

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist
