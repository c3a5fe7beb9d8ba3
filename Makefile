# Two commands do all their set-up: make demo, make test. Python >= 3.11, git and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 1)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slurm lint notebooks bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

install: $(STAMP) ## install diffx with pinned versions into .venv (done by the others at first need)

# uv only fetches and links faster; what is installed is what pip would install from the same pins
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "diffx needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv -c constraints.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[test]' || \
		$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt k-diffusion
	touch $(STAMP)

demo: $(STAMP) ## train, sample and evaluate a diffusion model on handwritten digits (minutes on a CPU)
	$(BIN)/diffx train

lint: $(STAMP) ## ruff, pyright, import layers, stripped notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	git ls-files -z '*.ipynb' | xargs -0 -r $(BIN)/nbstripout --verify

test: lint ## lint, then all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal --ignore tests/slurm

TEST_WORKERS ?= $(shell nproc 2>/dev/null || echo 1)

test-slurm: $(STAMP) ## bring up a real SLURM on this machine (Debian, root) and test launching and preemption on it
	@test "$$(id -u)" = 0 && test -e /etc/debian_version && $(BIN)/python tests/slurm/cluster.py install || true
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/slurm

notebooks: $(STAMP) ## run the notebooks and write them with their pictures into docs/notebooks (minutes)
	$(BIN)/python docs/render.py

# k-diffusion is there already: make install brings it without its dependencies, which ask for numpy < 2
$(VENV)/.bench: $(STAMP)
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[test,bench]' || \
		$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,bench]'
	touch $@

bench: $(VENV)/.bench ## measure training, networks, samplers, start-up, … against the peers (half an hour on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/run.py

clean: ## remove the environment and the caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
