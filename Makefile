# Everything a contributor or a new user runs. `make help` lists it.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: help demo demo-train test lint kernels clean

help:
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# A stamp per extra: installing is skipped while neither the requirements nor the pins changed.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

demo: $(VENV)/.installed-demo  ## install, then let a real model answer a question
	$(BIN)/python -m torchtune_fused.demo
	$(BIN)/tune run torchtune_fused/recipes/generate.py --config configs/smollm2_135m/generate.yaml

# A run that was stopped goes on where it was; delete the folder to train again.
TRAINED  := /tmp/torchtune-fused/demo-train
GENERATE := $(BIN)/tune run torchtune_fused/recipes/generate.py --config smollm2_135m/generate
QUESTION := prompt="What does os.path.commonpath do in Python?" max_new_tokens=64

demo-train: $(VENV)/.installed-demo  ## fine-tune that model on Python's documentation, and ask it before and after
	$(BIN)/python -m torchtune_fused.demo
	$(GENERATE) $(QUESTION)
	$(BIN)/tune run torchtune_fused/recipes/full_finetune.py --config smollm2_135m/full_finetune \
		max_steps_per_epoch=20 output_dir=$(TRAINED) resume=true
	$(GENERATE) $(QUESTION) checkpoint=$(TRAINED)/step_60

test: lint  ## install, lint, and run every test that needs no GPU
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

kernels: $(VENV)/.installed-dev  ## compile every CUDA kernel for every architecture, and check the compiler's report
	$(BIN)/torchtune-fused build --arch "8.0;8.6;8.9;9.0a" --check

clean:  ## remove the environment and build products
	rm -rf $(VENV) build dist *.egg-info kernels/*.so
