# make demo   set up, then answer a question through all services
# make test   set up, then run the tests; those of the gateway's page need Chromium, and are skipped without
# make clean  remove all that the others made
# TORCH_INDEX=URL chooses where torch comes from: outside a mirror that has CPU builds, the default Linux wheel is CUDA's.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
TORCH_FROM := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),)
KERNELS := services/colaserve_services/model/backend
PYTHONS := 3.11 3.12 3.13
COMPILED := hatch_build.py $(wildcard $(KERNELS)/cpu_kernels*.[ch])
LIBRARY := $(KERNELS)/_cpu_kernels.so

.PHONY: demo test lint types protos clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.serve
	@PATH="$(abspath $(BIN)):$$PATH" scripts/demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest tests

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	for target in $(subst .,,$(addprefix py,$(PYTHONS))); do $(BIN)/ruff check --target-version $$target --ignore UP . || exit 1; done
	$(BIN)/ruff format --check .
	if command -v $(CC) >/dev/null; then $(CC) -std=gnu11 -fopenmp -Wall -Wextra -Werror -fsyntax-only $(filter %.c,$(COMPILED)); fi
	cd protos && ../$(BIN)/buf lint
	cd protos && ../$(BIN)/buf format --diff --exit-code
	cd protos && ../$(BIN)/buf breaking --against baseline.binpb

types: $(addprefix types-,$(PYTHONS))

types-%: $(VENV)/.dev
	$(BIN)/mypy --python-version $* services
	$(BIN)/mypy --python-version $* --strict client

protos:
	PYTHON="$(PYTHON)" scripts/generate-protos

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "colaserve needs Python 3.11 or newer, this is " + sys.version)'
	@echo '==> making a virtual environment in $(VENV)'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.python constraints.txt
	@echo '==> installing $(TORCH) (about 1 GB; takes a minute or two). pip shows the progress:'
	@$(PIP) install $(TORCH_FROM) $(TORCH)
	@touch $@

$(VENV)/.serve: $(VENV)/.torch pyproject.toml client/pyproject.toml constraints.txt $(COMPILED)
	@echo '==> installing colaserve and what else it serves with'
	@$(PIP) install --constraint constraints.txt --editable client --editable '.[serve]'
	@test -x $(BIN)/colaserve || $(PIP) install --no-deps --force-reinstall --editable client  # an older colaserve took its command along
	@test -e $(LIBRARY) || echo '==> the parts in C were not compiled (that takes Linux and a C compiler): it works, and is slower on CPUs'
	@touch $@

$(VENV)/.dev: $(VENV)/.serve
	@echo '==> installing what the tests need'
	@$(PIP) install --constraint constraints.txt --editable client --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(LIBRARY)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
