# unimm: `make demo` shows the whole main job, `make test` runs every check.
# Both need Python 3.11 or 3.12 and this file; they build .venv once and then start in seconds.

.PHONY: demo test lint install clean
.DELETE_ON_ERROR:

VENV ?= .venv
BIN := $(VENV)/bin
DEMO_OUT ?= demo

# A candidate must run (a pyenv shim may not) and be able to make an environment (Debian splits ensurepip off).
find_python = for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
	2>/dev/null && echo $$p && break; done
PYTHON ?= $(shell $(find_python))

# uv installs in 24 s what takes pip 94 s (two cores, empty caches), but it does not read pip's configuration.
# Where that names another index or a proxy, pip installs. `make INSTALLER=pip` or `=uv` decides otherwise.
pip_is_configured = $(BIN)/python -m pip config list | grep -E '\.(index-url|no-index|proxy|trusted-host|client-cert)=' >/dev/null
INSTALLER ?= $(shell $(pip_is_configured) && echo pip || echo uv)
uv_install = $(BIN)/python -m pip install --quiet 'uv>=0.13' && \
	UV_SYSTEM_CERTS=1 $(BIN)/uv pip install --quiet --python $(BIN)/python
pip_install = $(BIN)/python -m pip install --quiet

# PyPI's own wheel of node, never the machine's; no look-up of newer releases.
pyright = PYRIGHT_PYTHON_GLOBAL_NODE=0 PYRIGHT_PYTHON_IGNORE_WARNINGS=1 \
	$(BIN)/pyright --pythonpath $(BIN)/python

demo: $(VENV)/.installed-core
	$(BIN)/unimm demo --out $(DEMO_OUT)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(pyright)
	$(BIN)/lint-imports

install: $(VENV)/.installed-core

clean:
	rm -rf $(VENV) $(DEMO_OUT) dist build .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "unimm needs Python 3.11 or 3.12 with venv and ensurepip: install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "unimm needs Python 3.11 or newer: $(PYTHON) does not run or is older; name another: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed-core: pyproject.toml | $(VENV)/.created
	@echo "installing unimm with $(INSTALLER)"
	@$($(INSTALLER)_install) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.created
	@echo "installing unimm and its checks with $(INSTALLER)"
	@$($(INSTALLER)_install) -e '.[dev]'
	@touch $@ $(VENV)/.installed-core
