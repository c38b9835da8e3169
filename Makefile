# Two commands set everything up in .venv and do something: `make demo` and `make test`. The rest is their parts.

PYTHON ?= python3
PROMPT ?= The with statement is used to
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
export PROMPT

# tests of what is read from files and written into them
FILES := $(wildcard tests/test_convert*.py) $(addprefix tests/test_,faults.py fuzz.py publish.py supply.py train_demo.py)

.PHONY: demo test test-torch test-triton test-files test-engines torture torture-model torture-files check format notebooks clean

# One thread: a model this small gains nothing from more, and waits for them where other programs use the cores.
demo: $(VENV)/installed-runtime  ## stream a continuation; make demo PROMPT="A generator is"
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
	  $(BIN)/python -m modeling_xlstm generate --model checkpoints/xlstm-demo --prompt "$$PROMPT"

test: check  ## everything that must pass before a change lands
	@echo "Three runs of pytest, about 20 minutes on two cores: each is printed when it has ended."
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-torch test-triton test-files

test-torch: $(VENV)/installed-test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(FILES:%=--ignore=%)

test-files: $(VENV)/installed-test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(FILES)

test-triton: $(VENV)/installed-test  ## kernels in Triton's interpreter, on a CPU
	TRITON_INTERPRET=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/test_*_triton*.py

test-engines: $(VENV)/installed-engines  ## DeepSpeed and Ray Train, in processes on a CPU
	DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/test_engines_*.py

torture: $(VENV)/installed-test  ## break it on purpose, thousands of times
	@echo "Two runs, about an hour on two cores: each is printed when it has ended."
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target torture-model torture-files

torture-model: $(VENV)/installed-test  ## any configuration and input, extreme numbers, threads; mutations of the maths
	XLSTM_TORTURE=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/test_properties.py tests/test_refusals.py \
	  tests/test_stress.py tests/test_concurrency.py
	$(BIN)/python tests/mutation.py

torture-files: $(VENV)/installed-test  ## damaged files, faults, clean environments
	XLSTM_TORTURE=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/test_fuzz.py tests/test_faults.py tests/test_supply.py

check: $(VENV)/installed-test  ## lint, format, types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/installed-test  ## mend what can be mended by a tool
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

notebooks: $(VENV)/installed-test  ## run them, and write their outputs, timings included, into them
	$(BIN)/python notebooks/execute.py

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache

# A stamp is newer than what it was installed from, or the install runs again (pip then changes only what differs).
$(VENV)/installed-runtime: setup.cfg constraints.txt pyproject.toml | $(BIN)/python
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/installed-test: setup.cfg constraints.txt pyproject.toml | $(BIN)/python
	$(PIP_INSTALL) --editable ".[test]"
	@touch $@

$(VENV)/installed-engines: setup.cfg constraints.txt pyproject.toml | $(BIN)/python
	$(PIP_INSTALL) --editable ".[engines]"
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c "import ensurepip" 2>/dev/null || { \
	  echo "$(PYTHON) cannot make a virtual environment: install Debian's package python3-venv, then try again." >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
