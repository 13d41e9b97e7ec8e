# Everything here makes its own environment first (.venv, CPU build of torch; `make TORCH=cuda demo` for CUDA).
PYTHON ?= python3
TORCH ?= cpu
BIN := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
RUN := .venv/$(BIN)/python
# In two processes, as a test itself starts up to two. A file's tests stay together, as they share what it sets up; the
# order stays, otherwise files with one long test come last and leave the other process idle.
WORKERS ?= 2
PYTEST_FLAGS := -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=15 --durations-min=8

# What a release of another library can break: names of arguments, doors, families, the lean path, a training step.
CORE := tests/models/test_caches.py tests/ztt/test_families.py tests/ztt/test_cache.py tests/ztt/test_as_a_transformers_model.py \
	tests/fast/test_caches.py tests/generate/test_huggingface_door.py tests/drafters/test_block.py \
	tests/fast/test_best.py tests/fast/test_lean.py tests/fast/test_lean_ztt.py tests/training/ztt/test_run.py \
	tests/training/ztt/test_adapters.py tests/ztt/test_peft.py tests/ztt/test_trl.py tests/ztt/test_lm_eval.py \
	tests/benchmarks/test_tasks.py tests/evaluation/test_harness.py

.PHONY: demo test test-newest test-vllm quality docs format env env-newest env-vllm clean

demo: env
	@$(RUN) examples/demo.py

test: env
	@$(RUN) -m pytest $(PYTEST_FLAGS)

# the newest releases of transformers, TRL, PEFT and lm-eval, in an environment of their own
test-newest: env-newest
	@.venv-newest/$(BIN)/python -m pytest $(PYTEST_FLAGS) $(CORE)

# Zero Token Transformers and drafters in vLLM for CPUs, which is large (540 MB) and has an environment of its own
test-vllm: env-vllm
	@.venv-vllm/$(BIN)/python -m pytest --durations=5 tests/plugins/vllm

quality: env
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m pyright
	@.venv/$(BIN)/lint-imports --no-cache
	@$(MAKE) --no-print-directory docs

# the pages of docs/ and a reference from the docstrings, in build/docs; dead links are errors
docs: export NO_MKDOCS_2_WARNING = 1
docs: env
	@$(RUN) -m mkdocs build --strict --quiet

format: env
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

env:
	@$(PYTHON) scripts/bootstrap.py --torch $(TORCH)

env-newest:
	@$(PYTHON) scripts/bootstrap.py --torch $(TORCH) --newest

env-vllm:
	@$(PYTHON) scripts/bootstrap.py --torch cpu --vllm

clean:
	rm -rf .venv .venv-newest .venv-vllm .pytest_cache .ruff_cache .hypothesis build dist
