.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup run test test-long mutants check format data pretrain-mnist clean slurm-up slurm-down

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
# Words for `run` and `pretrain-mnist` (overrides), `test` (pytest), `data` (sets), `mutants` (--sample 400):
# make run ARGS="epsilon=eps1"
ARGS ?=
# Each process of the tests takes whole files and a core; PARALLEL= runs them in one, for a debugger.
PARALLEL ?= -n 2 --dist loadfile --no-loadscope-reorder
# The letters of `pretrain-mnist`: rendered ones, or emnist_letters where its archive is.
PUBLIC ?= letters

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  ARGS="..." adds words to run, test, data and pretrain-mnist'

setup: .venv/installed-dev  ## install everything into .venv, with the tools for development

run: .venv/installed  ## run the default job: fine-tune, sample, evaluate
	$(BIN)/dp-lora $(ARGS)

test: .venv/installed-dev  ## run the tests
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-long: .venv/installed-dev  ## run what takes minutes and `test` leaves out
	$(BIN)/python -m pytest $(PARALLEL) -m slow $(ARGS)

mutants: .venv/installed-dev  ## break the private code line by line and see the tests fail; takes hours, resumes
	$(BIN)/python tools/mutants.py cover
	$(BIN)/python tools/mutants.py run $(ARGS)
	$(BIN)/python tools/mutants.py report

check: .venv/installed-dev  ## formatter, linter, types and tests: what has to pass before a commit
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(PARALLEL)

format: .venv/installed-dev  ## write the code the way `check` wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

data: .venv/installed  ## fetch the full MNIST and Fashion-MNIST, the fonts of the public letters, the public pictures
	$(BIN)/python -m dp_lora.commands.fetch $(ARGS)

pretrain-mnist: .venv/installed  ## pre-train the paper's MNIST model on letters: a matter for a GPU
	$(BIN)/dp-lora experiment=mnist data@public_data=$(PUBLIC) public_data.classes=null \
		public_data.train_size=124800 public_data.channels=3 'stages=[pretrain]' $(ARGS)

slurm-up:  ## start a real SLURM on this machine; root only where its packages are missing
	@tools/slurm_box.sh install
	@tools/slurm_box.sh up >/dev/null
	@echo 'dp-lora finds it; for squeue and the like: eval "$$(tools/slurm_box.sh env)"'

slurm-down:  ## end that SLURM and its jobs
	@tools/slurm_box.sh down

clean:  ## remove caches and built packages; .venv and the runs in outputs/ stay
	rm -rf dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv .venv

# A file of its own for each set of packages, so that `make run` does not wait for the tools.
.venv/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

.venv/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[dev]'
	@touch .venv/installed $@
