# Everything from nothing: Python >= 3.10, a C++ compiler and make are all that has to be there.
#
#   make demo     train on the bundled handwritten digits and write runs/demo/report.html
#   make test     all tests
#   make bench    ours beside its peers, in a table
#   make lint     what has to hold before a commit; `make format` mends most of it
#
# PYTHON chooses the interpreter, ARGS goes to pytest: make bench ARGS="--check --record"

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
NATIVE := $(wildcard csrc/*.* kernels/*/*.h kernels/*/*.cpp kernels/*/*.cuh kernels/*/*.cu)

.PHONY: demo test bench lint format

demo: $(INSTALLED)
	$(BIN)/idml-fast train --name demo --run.overwrite true

test: $(INSTALLED)
	$(BIN)/python -m pytest tests/ $(ARGS)

bench: $(INSTALLED)
	$(BIN)/python -m pytest bench/ --benchmark-only $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

$(BIN)/python:
	$(PYTHON) -m venv .venv
	$@ -m pip install --quiet -c constraints.txt pip

# The native module is built in an environment of its own, which needs its constraints said apart.
$(INSTALLED): constraints.txt pyproject.toml setup.py CMakeLists.txt $(NATIVE) | $(BIN)/python
	@echo "installing into .venv: the first time this takes a few minutes"
	$(BIN)/python -m pip install --quiet -c constraints.txt --build-constraint constraints.txt \
		-e '.[train,test,bench,lint]'
	touch $@
