# The table of contents. `make run` and `make test` do their own set-up on a machine that has Python and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two processes; the tests of a file run in one of them, so that what its fixtures start is started once.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: run test test-all proof check setup lock readme clean

# Real images where there are any, the five runs, one page: runs/quick/report.html
run: setup
	@$(BIN)/python -m jobs.suite --pack

# What can be run before each commit: the suite of five under Ray once, on S3, its workers killed; no other slow tests.
test: check
	$(PYTEST)

# The slow ones too. Coverage of `cluster` is what tests see from outside its processes: reported, not bounded.
test-all: check
	$(PYTEST) --all --cov --cov-report=
	$(BIN)/coverage report --include='cluster/*'
	$(BIN)/coverage report --include='imgcls/*' --fail-under=90 --skip-covered

# The full counts of tests/proof, then runs on S3 whose storage fails and that are killed; their records lie under
# docs/measurements/.
proof: setup
	$(BIN)/python -m pytest tests/proof --proof --record --timeout 1800
	$(BIN)/python -m pytest tests/imgcls/data/test_door.py tests/house/test_commands.py --proof --timeout 1800
	$(BIN)/python -m jobs.bench faults --kills 20

check: setup $(VENV)/validators
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

setup: $(VENV)/installed

# Installed again only when the lock or the package's own description changes.
$(VENV)/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "error: Python 3.11 to 3.13 is needed, $(PYTHON) is another: make PYTHON=python3.11"; exit 2; }
	@echo "set-up: installs about 6 GB of packages (PyTorch with CUDA is most of it) into $(VENV); once, some 4 minutes"
	@if test -t 1; then quiet=; else quiet=--quiet; fi; install() { $(BIN)/python -m pip install $$quiet --disable-pip-version-check "$$@"; }; \
	  $(PYTHON) -m venv $(VENV) && install --require-hashes -r requirements.txt && install --no-deps --no-build-isolation -e . \
	  || { echo "error: set-up did not finish, pip's or venv's reason stands above"; \
	       echo "  do: give it network (or PIP_INDEX_URL, HTTPS_PROXY) and 10 GB of disk, then the same command again"; exit 3; }
	@touch $@

# The validators of infra/, which tests import and a run does not need.
$(VENV)/validators: infra/requirements.txt tests/infra/requirements.txt $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes \
	  -r requirements.txt -r infra/requirements.txt -r tests/infra/requirements.txt
	@touch $@

# Two weeks old at the least: an index may know a release before it can serve it.
lock:
	compile="uv pip compile --universal --no-strip-extras --generate-hashes --no-emit-index-url --no-header --no-annotate --quiet \
	  --python-version 3.11 --exclude-newer $$(date -d '14 days ago' +%F)"; \
	$$compile --extra dev --extra export --extra mlflow pyproject.toml -o requirements.txt && \
	$$compile -c requirements.txt infra/requirements.in -o infra/requirements.txt && \
	$$compile -c requirements.txt -c infra/requirements.txt tests/infra/requirements.in -o tests/infra/requirements.txt

# The tables of README and guides, from the records in docs/measurements/.
readme: setup
	$(BIN)/python -m jobs.bench readme

clean:
	rm -rf $(VENV)
