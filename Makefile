# make demo      everything from nothing: set up, pack, train on two processes, interrupt, resume, evaluate, caption
# make quick     ruff, mypy and the unit tests, under a minute
# make test      set up and run all tests but the sweeps and those that need GPUs
# make sweep     the long sweeps through faults, apart from make test
# make soak      training under a random storm of faults; MINUTES=30
# make gpu       on a machine with GPUs: tests and short benchmarks, ten minutes at most, into a report to send in
# make install   only the set-up: a virtual environment in .venv with pinned versions
# make check     ruff and mypy
# make clean     remove what make made (.venv, runs/demo, caches)

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo quick test sweep soak gpu install check clean

demo: install
	$(BIN)/captioning demo

quick: check
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=5 -m 'not sweep and not slow' tests/unit

# Two at a time: most tests wait for a process to import torch, on one core. A file's tests stay together.
test: install check
	$(BIN)/python -m pytest -n 2 --dist loadfile

sweep: install
	$(BIN)/python -m pytest -m sweep -n 2 --dist loadfile

MINUTES ?= 30

soak: install
	$(BIN)/python -m tests.soak --minutes $(MINUTES)

gpu: install
	$(BIN)/captioning doctor --gpu --out gpu-report

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12" if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs/demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
