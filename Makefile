# Everything from nothing: Python >= 3.10, a C++ compiler and make are all that has to be there.
#
#   make demo         train on the bundled handwritten digits and write runs/demo/report.html
#   make demo-images  the same from image files, stopped and resumed; runs/demo-images/report.html
#   make test         all tests
#   make bench        ours beside its peers, in a table
#   make bench-check  the same, and fails where ours has become slower beside them than recorded
#   make precision    the errors of every precision, into docs/precision.md
#   make gpu-check    on a machine with a GPU: tests, compute-sanitizer, benchmarks; no network
#   make lint         what has to hold before a commit; `make format` mends most of it
#
# PYTHON chooses the interpreter, ARGS goes to pytest: make bench ARGS="--check --record"
# RESULTS is the folder of recorded runs. bench-check compares ratios to peers, not times, with the
# last run there on the same kind of device, and where one has become worse runs once more: it is a
# failure if it is worse again. It records nothing, and having nothing to compare is a failure too.
# IDML_FAST_CUDA_ARCHS chooses the GPUs to compile for, where there is nvcc; none saves minutes.

PYTHON ?= python3
RESULTS ?= bench/results
SANITIZER ?= compute-sanitizer
BIN := .venv/bin
INSTALLED := .venv/installed
NATIVE := $(wildcard csrc/*.* kernels/*/*.h kernels/*/*.cpp kernels/*/*.cuh kernels/*/*.cu)

.PHONY: demo demo-images test bench bench-check precision gpu-check lint format

demo: $(INSTALLED)
	$(BIN)/idml-fast train --name demo --run.overwrite true

# Its usual wheel of torchvision cannot be imported beside a torch for CPUs alone.
demo-images: $(INSTALLED)
	$(BIN)/python tests/any_torchvision.py examples/demo_images.py

# Two tests at a time with a thread each: many of them interpret kernels, one step after the other.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/ -n 2 $(ARGS)

bench: $(INSTALLED)
	$(BIN)/python -m pytest bench/ --benchmark-only $(ARGS)

bench-check: $(INSTALLED)
	@new=$$(mktemp -d) && trap 'rm -rf "$$new"' EXIT && trap 'exit 130' INT TERM && \
	run() { $(BIN)/python -m pytest bench/ --benchmark-only --record="$$new" $(ARGS); } && \
	check() { $(BIN)/idml-fast bench check "$$new" --results $(RESULTS); } && \
	run && { check || { test $$? -eq 1 && echo "==== once more: a bad moment does not come back" && \
		run && check; }; }

precision: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore bench/precision.py

# With the Python, torch and Triton that are there, compiled for the GPU that is there. A step has a
# limit in seconds, nine minutes in all, and runs whatever became of those before it; the exit code
# tells of all of them.
gpu-check:
	@failed=; \
	step() { \
		name=$$1 limit=$$2; shift 2; \
		echo "==== $$name: $$*"; \
		timeout --signal=INT --kill-after=5 $$limit "$$@" || failed="$$failed $$name"; \
	}; \
	archs=$$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | \
		sed 's/\.//; s/^90$$/90a/; s/$$/-real/' | sort -u | paste -sd ';' -); \
	step install 100 env IDML_FAST_CUDA_ARCHS="$${IDML_FAST_CUDA_ARCHS-$$archs}" \
		$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps -e .; \
	step tests 130 $(PYTHON) -m pytest tests/test_gpu.py tests/test_gpu_cuda.py -m gpu -q -n auto \
		--maxprocesses=16 --measured=$(RESULTS); \
	if command -v $(SANITIZER) > /dev/null; then \
		for tool in memcheck racecheck; do \
			step $$tool 38 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
				$(SANITIZER) --tool $$tool --error-exitcode 1 $(PYTHON) tests/sanitized.py; \
		done; \
	else \
		echo "==== memcheck, racecheck: not done, there is no $(SANITIZER) here"; \
	fi; \
	step benchmarks 234 $(PYTHON) -m pytest bench/bench_gpu.py -q --benchmark-only \
		--benchmark-quiet --check --record=$(RESULTS); \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE) tests/cuda/*

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE) tests/cuda/*

$(BIN)/python:
	$(PYTHON) -m venv .venv
	$@ -m pip install --quiet -c constraints.txt pip

# The native modules are built in an environment of their own, which needs its constraints said apart.
$(INSTALLED): constraints.txt pyproject.toml setup.py CMakeLists.txt $(wildcard kernels/*/CMakeLists.txt) \
		$(NATIVE) | $(BIN)/python
	@echo "installing into .venv: the first time this takes a few minutes"
	$(BIN)/python -m pip install --quiet -c constraints.txt --build-constraint constraints.txt \
		-e '.[train,vision,test,bench,lint]'
	touch $@
