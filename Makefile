# make train | make test | make lint: each creates .venv on first use and installs what it needs.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES = pyproject.toml constraints.txt

.PHONY: help train eval test test-fast lint format clean

help:
	@echo "make train      train a small NAT on handwritten digits (ARGS='model=swin_nano' to change things)"
	@echo "make test       run every test;  make test-fast leaves out the slow ones"
	@echo "make lint       ruff and mypy;   make format rewrites files as ruff wants them"
	@echo "make clean      remove $(VENV) and caches"

# A model this small is half as fast again on one thread as on two; ARGS can say otherwise.
train: $(VENV)/.installed
	@$(BIN)/python train.py hardware.threads=1 $(ARGS)

eval: $(VENV)/.installed
	@$(BIN)/python eval.py $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -c tests/pytest.ini tests $(ARGS)

test-fast: $(VENV)/.installed-test
	$(BIN)/python -m pytest -c tests/pytest.ini tests -m "not slow" $(ARGS)

# mypy needs the root under the package's name; the link gives it that without a copy.
lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p $(VENV)/types && ln -sfn "$(CURDIR)" $(VENV)/types/nearfield
	MYPYPATH=$(VENV)/types $(BIN)/mypy -p nearfield
	MYPYPATH=$(VENV)/types $(BIN)/mypy scripts

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created $(SOURCES)
	@echo "installing nearfield into $(VENV) (PyTorch alone is several GB: a minute or more)"
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(INSTALL) --editable ".[test]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache tests/.pytest_cache .hypothesis
