# Two commands carry the course: `make lab` and `make test`; `make help` lists the rest. Needs git, make, Python 3.11+.
# Works from any folder of the clone: make -C .. test, or make -f ../Makefile test.

ROOT := $(shell cd "$$(dirname "$(strip $(MAKEFILE_LIST))")" && pwd -P)
.DEFAULT_GOAL := help

ifneq ($(ROOT),$(CURDIR)) # called from another folder: the same goals, in the clone's own
.PHONY: $(or $(MAKECMDGOALS),help)
$(or $(MAKECMDGOALS),help):
	@$(MAKE) --no-print-directory -C "$(ROOT)" $@
else

JOBS ?= 2# notebooks and test files that run at once
chosen_python := $(if $(filter environment command,$(firstword $(origin PYTHON))),$(PYTHON))
new_enough := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$python" -c '$(new_enough)' 2>/dev/null && echo "$$python" && break; done)

export JUPYTER_PREFER_ENV_PATH := 1# the kernel of this environment, never one of the machine
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONPATH PYTHONHOME
run := .venv/bin/python
quiet := {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": false}}

# The environment is complete when .venv/.ready exists: it is written last, so an interrupted set-up starts over. It
# holds what the environment was made for; another place, Python or index asked for makes it anew.
ready := .venv/.ready
asked := "in $(ROOT)" $(if $(TORCH_INDEX),"torch $(TORCH_INDEX)") $(if $(chosen_python),"python $(chosen_python)")
stale := $(shell for line in $(asked); do grep -qxF "$$line" $(ready) 2>/dev/null || echo stale; done)

$(ready): requirements.lock pyproject.toml $(if $(stale),FORCE)
	@"$(PYTHON)" -c '$(new_enough)' 2>/dev/null || { \
		echo "The course needs Python 3.11 or newer, and $(or $(chosen_python),python3) is not. Name one: make lab PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) lacks its venv module. On Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	@test ! -e .venv || test -e .venv/.course || { \
		echo "There is a .venv here that this Makefile did not make. Move it away, then try again." >&2; exit 1; }
	@rm -rf .venv && mkdir .venv && touch .venv/.course
	"$(PYTHON)" -m venv .venv
	$(if $(TORCH_INDEX),$(run) -m pip install --no-deps --index-url "$(TORCH_INDEX)" "$$(grep '^torch==' requirements.lock)")
	$(run) -m pip install --requirement requirements.lock
	$(run) -m pip install --no-build-isolation --no-deps --editable .
	$(run) -m course_lib.lessons.notebooks --kernel
	@mkdir -p .venv/share/jupyter/lab/settings && echo '$(quiet)' > .venv/share/jupyter/lab/settings/overrides.json
	@printf '%s\n' "in $(ROOT)" "torch $(TORCH_INDEX)" "python $(PYTHON)" > $@

.PHONY: FORCE help lab test notebooks conformance bench lock clean
FORCE:

lab: $(ready) ## set up, then open JupyterLab at lesson 00
	$(run) -m jupyterlab --ServerApp.root_dir="$(ROOT)" $(if $(filter 0,$(shell id -u)),--allow-root) \
		--LabApp.default_url="/lab/tree/$(firstword $(wildcard notebooks/00_*.ipynb) README.md)" $(LAB_FLAGS)

test: $(ready) ## set up, then run all tests, notebooks included
	$(run) -m pytest -n $(JOBS) --dist loadgroup --no-loadscope-reorder $(or $(TESTS),tests)

notebooks: $(ready) ## run the notebooks again and store them, normalised
	$(run) -m course_lib.lessons.notebooks $(NB)

conformance: $(ready) ## hold the device to PyTorch's own operator samples, all of them (some minutes)
	$(run) -W ignore tests/conformance.py

bench: $(ready) ## print the speed of the emulation on this machine
	$(run) tests/bench.py
	$(run) tests/bench_core.py

lock: ## write requirements.lock anew; PYTHON is to be the oldest Python allowed
	rm -rf build/lock && "$(PYTHON)" -m venv build/lock
	build/lock/bin/python -m pip install "$$(grep '^torch==' requirements.lock)" \
		"hatchling>=1.25,<2" "editables>=0.5,<1" ".[lab,test]"
	{ grep -E '^#|;' requirements.lock; \
		build/lock/bin/python -m pip freeze --all --exclude pip --exclude course-lib \
		| sed 's/+cpu$$//' | grep -Ev '^(nvidia|cuda|triton)'; } > build/requirements.lock
	mv build/requirements.lock requirements.lock

clean: ## remove the environment and everything else that can be made again
	test ! -e .venv/.course || rm -rf .venv
	rm -rf build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  make lab PYTHON=python3.12            with this Python"
	@echo "  make lab TORCH_INDEX=<address>        with the CPU-only PyTorch, on Linux some 2 GB smaller: the address that"
	@echo "                                        PyTorch's page Get started shows after --index-url when you choose CPU"
	@echo "  make lab LAB_FLAGS=--no-browser       with any flags of JupyterLab"
	@echo "  make test TESTS=tests/chip JOBS=1     some tests only, one at a time"
	@echo "  make notebooks NB=notebooks/00_*      some notebooks only"

endif
