# Every target first makes $(VENV) and installs into it what constraints.txt pins: minutes the first time,
# nothing after that until pyproject.toml or constraints.txt changes. `make PYTHON=python3.12 …` picks an interpreter.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Named on pip's command line beside the package, so that a CPU build is taken where pip is offered one.
TORCH := $(shell grep '^torch==' constraints.txt)
# Two workers with one thread each: the interpreter and the gloo tests are single-threaded.
WORKERS ?= 2

TRAIN := $(BIN)/python examples/tiny.py
BENCHES := bench.loss_memory bench.loss_speed bench.loss_precision bench.step

OLDEST_TRITON := 3.6.0
NEWEST_TRITON := 3.9.0
KERNEL_TESTS := tests/test_interpreter.py tests/kernels

.PHONY: help venv train compare test test-slow test-triton bench aot lint format clean
.DEFAULT_GOAL := help

help:
	@echo 'make train        the whole recipe with tiny models, in minutes, no GPU needed'
	@echo 'make compare      SFT, KD, GRPO, OPD and dGRPO side by side, on two cores for hours'
	@echo 'make test         run the tests (no GPU needed)'
	@echo 'make test-slow    run the slow tests: packaging, whole training runs'
	@echo 'make test-triton  run the kernel tests under triton $(OLDEST_TRITON) and $(NEWEST_TRITON)'
	@echo 'make bench        compare with other implementations at CPU sizes'
	@echo 'make aot          compile every kernel for GPUs without having one, and check the machine code'
	@echo 'make lint         check style;  make format  apply it'
	@echo 'make venv         only make $(VENV);  make clean  remove what the targets made'

venv: $(VENV)/.installed

# $(call make_venv,folder)
define make_venv
@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON) on the PATH; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1), but dgrpo needs Python 3.11 or newer;" \
	"name one: make PYTHON=python3.11" >&2; exit 1; }
@test -x $(1)/bin/python || { echo "== making $(1) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(1); }
endef

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call make_venv,$(VENV))
	@echo "== installing dgrpo and its tools into $(VENV) (about 2 GB and a few minutes the first time)"
	$(BIN)/python -m pip install --quiet -c constraints.txt $(TORCH) -e '.[dev]'
	@touch $@

train: $(VENV)/.installed
	@echo '== training'
	$(TRAIN)

compare: $(VENV)/.installed
	@echo '== comparing the methods'
	$(BIN)/python -m examples.compare

# loadfile: the Python blocks of a document share their names.
test: $(VENV)/.installed
	@echo '== testing'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-slow: $(VENV)/.installed
	@echo '== running the slow tests'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# One venv per version: triton $(OLDEST_TRITON)'s interpreter needs numpy < 2.4, and torch's CPU build pins no triton.
.venv-triton-%/.installed: pyproject.toml constraints.txt
	$(call make_venv,.venv-triton-$*)
	@echo "== installing triton $* into .venv-triton-$*"
	@sed -E '/^(numpy|triton)[=<>]/d' constraints.txt > .venv-triton-$*/constraints.txt
	.venv-triton-$*/bin/python -m pip install --quiet -c .venv-triton-$*/constraints.txt \
		$(TORCH) triton==$* 'numpy<2.4' pytest hypothesis || { \
		echo "error: torch's CUDA builds pin one triton; this target needs the CPU build of torch" >&2; exit 1; }
	@touch $@

.PRECIOUS: .venv-triton-%/.installed
test-triton-%: .venv-triton-%/.installed
	@echo '== testing the kernels under triton $*'
	OMP_NUM_THREADS=1 .venv-triton-$*/bin/python -m pytest $(KERNEL_TESTS)

test-triton: test-triton-$(OLDEST_TRITON) test-triton-$(NEWEST_TRITON)

bench: $(VENV)/.installed
	@set -e; for module in $(BENCHES); do echo "== $$module"; $(BIN)/python -m $$module; done

aot: $(VENV)/.installed
	@echo '== compiling every kernel ahead of time'
	$(BIN)/python -m bench.aot --all

lint: $(VENV)/.installed
	@echo '== checking style'
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-triton-* build dist *.egg-info .pytest_cache .ruff_cache
