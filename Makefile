# Each target prepares what it needs: a virtual environment in $(VENV), a build of torch that suits the machine, this package.
# A stamp file in the environment records what was installed; it is renewed when pyproject.toml or setup.py changes.

PYTHON ?= python3
VENV ?= .venv
# The newest release that PyPI serves, as a user's pip install takes it; TRANSFORMERS=4.57.6 names another one.
TRANSFORMERS ?= newest
ARGS ?=

comma := ,
CPU_TORCH := 2.13.0+cpu
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# OneFlow needs a Python of its own. python3.10 on the PATH may be pyenv's stand-in for one that is not active: it must run.
PYTHON310 ?= $(shell for python in python3.10 $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/3.10.*/bin/python3.10; do \
	$$python -c "" 2>/dev/null && echo $$python && break; done)
VENV_ONEFLOW ?= .venv-oneflow
ONEFLOW_PY := $(VENV_ONEFLOW)/bin/python
# The tests of the web demo and of clients run beside transformers 5: they and transformers 4 ask for different releases of huggingface_hub.
# Ray knows nothing of transformers, and once is enough.
EXTRAS := dev$(comma)pictures$(if $(filter 4.%,$(TRANSFORMERS)),,$(comma)web$(comma)clients$(comma)ray)
REQUIREMENT := transformers$(if $(filter newest,$(TRANSFORMERS)),,==$(TRANSFORMERS))
READY := $(VENV)/.ready-$(TRANSFORMERS)
READY_DEV := $(VENV)/.ready-dev-$(TRANSFORMERS)

.DEFAULT_GOAL := help
.PHONY: help demo serve test test-long test-gpu test-oneflow lint bench pictures clean

help: ## list the targets and the variables
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  PYTHON=$(PYTHON)  VENV=$(VENV)  TRANSFORMERS=$(TRANSFORMERS)  PYTHON310=$(PYTHON310)  ARGS='options passed on to the program'"

demo: $(READY) ## install on first use, then chat with the tiny checkpoint
	@$(PY) examples/demo.py --tiny $(ARGS)

serve: $(READY) ## install on first use, then serve the tiny checkpoint on http://127.0.0.1:8000
	@$(PY) -c 'import fastapi, prometheus_client, uvicorn' 2>/dev/null || $(PIP) install -q -e '.[serve]'
	@$(PY) -m faster_chatglm_6b serve --tiny $(ARGS)

test: $(READY_DEV) ## install on first use, then run the tests that need no GPU
	$(PY) -m pytest -n auto --dist loadfile -m "not gpu and not long" $(ARGS)

test-long: $(READY_DEV) ## run the property tests with many random examples, and the tests marked long
	$(PY) -m pytest -n auto --dist loadfile -m "(hypothesis or long) and not gpu" --hypothesis-profile=long $(ARGS)

test-gpu: $(READY_DEV) ## run the tests that need an NVIDIA GPU
	$(PY) -m pytest -m "gpu and not long" $(ARGS)

test-oneflow: $(VENV_ONEFLOW)/.ready ## run the tests on OneFlow instead of PyTorch, on the CPU (Python 3.10)
	$(ONEFLOW_PY) -m pytest --confcutdir=tests/oneflow tests/oneflow $(ARGS)

lint: $(READY_DEV) ## check style and format with ruff, and that each room imports only rooms below it
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports

bench: $(READY) ## measure decoding (NVIDIA GPU; ARGS="--help" lists the options)
	$(PY) examples/benchmark.py $(ARGS)

pictures: $(READY_DEV) ## draw the pictures and write the tables of README and docs/speed.md anew from images/data (needs a Chinese font)
	@status=0; for script in images/make_*.py; do $(PY) $$script $(ARGS) || status=1; done; exit $$status

clean: ## remove the environments and everything that was generated
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch for a machine without an NVIDIA GPU. PyPI's Linux build is several GB of CUDA libraries, and PyPI has no other: look for the
# CPU build where pip is set up to look, then let uv fetch it (uv knows PyTorch's own index), and take PyPI's build only at the last.
define install_torch
	if $(PY) -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'; then :; \
	elif nvidia-smi >/dev/null 2>&1 || [ "$$(uname -s)" != Linux ]; then $(PIP) install -q torch; \
	elif $(PIP) install -q "torch==$(CPU_TORCH)" 2>/dev/null; then :; \
	elif $(PIP) install -q uv && $(PY) -m uv pip install -q --python $(PY) --torch-backend cpu "torch>=2.4"; then :; \
	else echo "No CPU build of torch can be reached: installing PyPI's build, a download of several GB."; \
		$(PIP) install -q torch; \
	fi
endef

# The kernels' tests need a Triton; CUDA builds of torch bring the one that suits them. Before the clients, which would bring another.
define install_interpreter
	$(PY) -c 'import importlib.util as u, sys; sys.exit(u.find_spec("triton") is None)' || $(PIP) install -q -e '.[interpreter]'
endef

# The stamps of one environment replace each other: only the version of transformers that was installed last is ready.
# "newest" is what was newest then; make clean, and the next make looks again.
$(READY) $(READY_DEV): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
		"$(PYTHON) is Python %d.%d, but 3.10 or newer is needed; name one: make PYTHON=python3.11" % sys.version_info[:2])'
	@echo "Preparing $(VENV) (transformers $(TRANSFORMERS)); the first time takes a few minutes."
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.ready-*
	@$(install_torch)
	@$(if $(findstring .ready-dev,$@),$(install_interpreter))
	@$(PIP) install -q -e '.$(if $(findstring .ready-dev,$@),[$(EXTRAS)])' --upgrade '$(REQUIREMENT)'
	@touch $(VENV)/.ready-$(TRANSFORMERS) $@

# No torch in here. --no-deps: the package's own list asks for it.
$(VENV_ONEFLOW)/.ready: tests/oneflow/requirements.txt pyproject.toml setup.py
	@if [ -z "$(PYTHON310)" ]; then \
		echo "OneFlow 0.9.0 needs Python 3.10, and none is found on the PATH or among pyenv's versions."; \
		echo "Install one (pyenv install 3.10, uv python install 3.10, or your system's python3.10 with its venv module),"; \
		echo "or name it: make test-oneflow PYTHON310=/path/to/python3.10"; \
		exit 1; \
	fi
	@echo "Preparing $(VENV_ONEFLOW) with $(PYTHON310) (OneFlow 0.9.0, transformers 4.27.1): a download of 1.5 GB."
	@$(ONEFLOW_PY) -m pip --version >/dev/null 2>&1 || $(PYTHON310) -m venv $(VENV_ONEFLOW)
	@$(ONEFLOW_PY) -m pip --disable-pip-version-check install -q -r tests/oneflow/requirements.txt
	@$(ONEFLOW_PY) -m pip --disable-pip-version-check install -q --no-deps -e .
	@touch $@
