# make train | make test | make lint: each creates .venv on first use and installs what it needs.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

# Processes that run tests side by side, each on one thread; files are not split. JOBS=0 runs all in one.
JOBS ?= 2

BIN = $(VENV)/bin
PYTEST = $(BIN)/python -m pytest -c tests/pytest.ini -n $(JOBS) --dist loadfile
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES = pyproject.toml constraints.txt

.PHONY: help train eval test test-fast test-gpu lint format clean

help:
	@echo "make train      train a small NAT on handwritten digits (ARGS='model=swin_nano' to change things)"
	@echo "make test       run every test;  make test-fast leaves out the slow ones (ARGS='-k window' selects)"
	@echo "make test-gpu   the tests that need a CUDA device (ARGS='-m gpu' adds the slow ones)"
	@echo "make lint       ruff and mypy;   make format rewrites files as ruff wants them"
	@echo "make clean      remove $(VENV) and caches"

# A model this small is half as fast again on one thread as on two; ARGS can say otherwise.
train: $(VENV)/.installed
	@$(BIN)/python train.py hardware.threads=1 $(ARGS)

eval: $(VENV)/.installed
	@$(BIN)/python eval.py $(ARGS)

# Three processes: one that interprets kernels cannot compile them. $(1) narrows the marks. Nothing collected (code 5)
# is a failure, but where ARGS selects tests and some of them are found in another phase.
define run_tests
	@result=0; found=no; \
	phase() { \
		printf '\n=== tests, phase %s\n' "$$1"; folder=$$2; shift 2; code=0; \
		"$$@" $(ARGS) $(if $(filter tests tests/%,$(ARGS)),,$$folder) || code=$$?; \
		case $$code in \
			0) found=yes ;; \
			2) exit 2 ;; \
			5) $(if $(strip $(ARGS)),echo "ARGS selects no test of this phase",result=5) ;; \
			*) found=yes; result=$$code ;; \
		esac; \
	}; \
	phase "1 of 3: everything but kernels" tests \
		env -u TRITON_INTERPRET $(PYTEST) -m "not interpreted and not aot and not gpu$(1)"; \
	phase "2 of 3: kernels, interpreted" tests/kernels env TRITON_INTERPRET=1 $(PYTEST) -m "interpreted$(1)"; \
	phase "3 of 3: kernels, compiled ahead of time" tests/kernels env -u TRITON_INTERPRET $(PYTEST) -m "aot$(1)"; \
	if [ $$result = 0 ] && [ $$found = no ]; then echo "ARGS selects no test of any phase"; result=5; fi; \
	exit $$result
endef

test: $(VENV)/.installed-test
	$(call run_tests,)

test-fast: $(VENV)/.installed-test
	$(call run_tests, and not slow)

test-gpu: $(VENV)/.installed-test
	env -u TRITON_INTERPRET $(PYTEST) -n 0 tests -m "gpu and not slow" $(ARGS)

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
