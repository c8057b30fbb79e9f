# `make demo` and `make test` are all that a new checkout needs.
PYTHON ?= python3
VENV := .venv

.PHONY: demo test install clean

install: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'graft needs Python 3.11 or newer; give one with PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

demo: install
	$(VENV)/bin/graft train recipes/chain_sum/config.toml --new

test: install
	scripts/check

clean:
	rm -rf $(VENV)
