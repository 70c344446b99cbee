# `make test` and `make demo` need Python 3.11 or newer with pip and venv; they set up .venv themselves.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
RUN_DIR := runs/demo

# The oldest torch and triton that pyproject.toml allows, on the Python of their GPU wheels.
OLDEST_PYTHON ?= python3.12
OLDEST := .venv-oldest

.PHONY: demo hopper test test-oldest lint clean

demo: $(INSTALLED)
	rm -rf $(RUN_DIR)
	$(VENV)/bin/polygrad-fast train --env-id InvertedPendulum-v5 --preset quick --seed 0 --run-dir $(RUN_DIR)
	$(VENV)/bin/polygrad-fast evaluate $(RUN_DIR) --episodes 10

# A Hopper learns to hop in about twenty minutes, on this seed (it depends on seed and processor); the video needs OpenGL
# (MUJOCO_GL=egl or osmesa without a display), the returns do not.
hopper: $(INSTALLED)
	rm -rf runs/hopper
	$(VENV)/bin/polygrad-fast train --env-id Hopper-v5 --preset laptop --world-model autoregressive --seed 302 --run-dir runs/hopper
	$(VENV)/bin/polygrad-fast evaluate runs/hopper --episodes 100
	-$(VENV)/bin/polygrad-fast evaluate runs/hopper --episodes 1 --video runs/hopper/hopper.mp4

# One thread per process: pytest already starts one process per core.
test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto

# The kernels' tests with them, interpreted and compiled; the wheels are 3 GB. The interpreter of triton 3.6 does not run
# with NumPy 2.4.
test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n auto tests/kernels

$(OLDEST)/.installed: pyproject.toml setup.py constraints.txt
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	sed -e 's/^torch==.*/torch==2.11.0/' -e 's/^triton==.*/triton==3.6.0/' -e 's/^numpy==.*/numpy==2.3.5/' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt -e '.[triton]' pytest pytest-benchmark pytest-xdist hypothesis
	@touch $@

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks

$(INSTALLED): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "polygrad_fast needs Python 3.11 or newer, but $(PYTHON) is %d.%d: run make PYTHON=/path/to/python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@
