# Needs git, make, and Python 3.11 or newer; everything else is installed by the first target that you call, once.
# In an active virtual or conda environment that environment is used; otherwise .venv/ is made here.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help env kernel run-notebook lab config check plan cache verify predict test test-fast test-notebooks chaos bench update new-notebook lint lock clean

# Variables of the command line: one that no target knows would be lost without a word.
KNOWN := NB TASK PROFILE P KEY FROM NAME RUN RELEASED TIMES EVERY OUT ARGS B N PYTHON
$(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(if $(filter $(KNOWN),$(name)),, \
	$(error No target knows '$(name)'; there are $(KNOWN). Settings go into one P, in quotes: P="training.lr=1e-3 seed=2"))))
# These reach the recipes through the environment, word for word: neither make nor the shell looks for $ in them.
$(foreach name,NB TASK PROFILE P KEY FROM NAME RUN RELEASED TIMES EVERY OUT,$(eval override export $(name) := $$(value $(name))))

# The first of these that runs and can make an environment; choose another with `make PYTHON=/path/to/python3.12 ...`.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

# The active environment, if any. Conda's `base` counts only where torch is in it, as in a hub's image: a laptop's bare
# base stays as it is.
ACTIVE := $(shell for folder in "$$VIRTUAL_ENV" "$$CONDA_PREFIX"; do \
	[ -x "$$folder/bin/python" ] && ! [ "$$folder" -ef .venv ] || continue; \
	[ "$$CONDA_DEFAULT_ENV" = base ] && [ "$$folder" = "$$CONDA_PREFIX" ] \
		&& ! "$$folder/bin/python" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("torch"))' && continue; \
	echo "$$folder"; break; done)
PY := $(if $(ACTIVE),$(ACTIVE)/bin/python,.venv/bin/python)
# Where Python may not keep what it has compiled, each new process compiles torch and the rest again: 10 s of work.
unexport PYTHONDONTWRITEBYTECODE
# Where the environment has all but this folder, nothing is installed.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
# Developers' packages come with the first call of these.
test test-fast test-notebooks chaos bench lint: EXTRA := dev
PARALLEL := -n 2 --dist loadgroup

help:  ## what there is (this list)
	@echo "make TARGET, where TARGET is one of:"
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | awk -F'|' '{ printf "  %-15s %s\n", $$1, $$2 }'

env:  ## install what the course needs, once (every target below does this by itself)
ifeq ($(ACTIVE),)
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || { \
		"$(PYTHON)" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
			echo "This course needs Python 3.11 or newer with its venv module; '$(PYTHON)' is none."; \
			echo "Install one, or name yours: make PYTHON=/path/to/python3.12 env"; exit 1; }; \
		"$(PYTHON)" -P helpers/tools/environment.py .venv; }
endif
	@"$(PY)" -P helpers/tools/environment.py "" $(EXTRA)

kernel: EXTRA := kernel
kernel: env  ## register this environment as the kernel "Surya course" (on a hub, make env does it)

run-notebook: env  ## run NB=finetune from top to bottom [TASK=..] [PROFILE=..] [P="training.lr=1e-3 seed=1"]
	@"$(PY)" -m helpers.tools.run_notebook "$$NB" $(if $(TASK),--task "$$TASK") \
		$(if $(PROFILE),--profile "$$PROFILE") --parameters "$$P"

lab: env  ## open JupyterLab on the same environment
	@JUPYTER_PREFER_ENV_PATH=1 "$(PY)" -m jupyterlab --ServerApp.root_dir=. $(ARGS)

config: env  ## every setting, its value and the layer that set it [TASK=..] [PROFILE=..] [P=..] [KEY=training.lr, or a section]
	@"$(PY)" -m helpers.tools.show_config $(if $(TASK),--task "$$TASK") $(if $(PROFILE),--profile "$$PROFILE") \
		$(if $(KEY),--key "$$KEY") --parameters "$$P"

verify: env  ## forecast as NASA did, and compare the errors [PROFILE=surya_4k] [P=..] [ARGS="--reduce 4", "--times 1"]
	@"$(PY)" -m helpers.tools.verify $(if $(PROFILE),--profile "$$PROFILE") --parameters "$$P" $(ARGS)

predict: env  ## predict where there is no label: RUN=.. or RELEASED=.. TIMES=2014-01-07/2014-01-09 [EVERY=60] [OUT=..]
	@"$(PY)" -m helpers.tools.predict --run "$$RUN" --released "$$RELEASED" --times "$$TIMES" \
		$(if $(EVERY),--every "$$EVERY") $(if $(OUT),--out "$$OUT") $(if $(TASK),--task "$$TASK") \
		$(if $(PROFILE),--profile "$$PROFILE") --parameters "$$P"

test: env  ## run the tests and one whole notebook, 6 minutes [ARGS="tests/test_lora.py -k merge"]
	@"$(PY)" -m pytest $(PARALLEL) -m "not notebook" $(ARGS)

test-fast: env  ## run the tests that take no time
	@"$(PY)" -m pytest $(PARALLEL) -m "not notebook and not slow" $(ARGS)

test-notebooks: env  ## run every notebook, and every kind of task, 20 minutes
	@"$(PY)" -m pytest $(PARALLEL) -m notebook $(ARGS)

chaos: env  ## try kills, full disks, several at once and bad inputs, one table (an hour) [N=10: at most 10 of each kind]
	@"$(PY)" tests/chaos $(N)

bench: env  ## measure the speed, one table (8 minutes); B=list names other benchmarks, B=name runs one [ARGS=..]
ifeq ($(B),list)
	@echo "make bench B=NAME, where NAME is one of:"
	@for file in tests/benchmarks/*.py; do \
		printf '  %-28s %s\n' "$$(basename "$$file" .py)" "$$(sed -n '1s/^"""//p' "$$file" | sed 's/"""$$//')"; done
else
	@"$(PY)" "tests/benchmarks/$(basename $(or $(B),speed)).py" $(ARGS)
endif

check: env  ## what this machine has, what is missing, and how to fix it [TASK=..] [PROFILE=..]
	@HF_HUB_OFFLINE=1 "$(PY)" -m helpers.tools.check $(if $(TASK),--task "$$TASK") \
		$(if $(PROFILE),--profile "$$PROFILE") --parameters "$$P"

plan: env  ## what a task would use, download and store [TASK=..] [PROFILE=..] [P="..."]
	@"$(PY)" -m helpers.tools.cache --plan $(if $(TASK),--task "$$TASK") $(if $(PROFILE),--profile "$$PROFILE") \
		--parameters "$$P"

cache: env  ## reduce the frames of the config into its store [TASK=..] [PROFILE=..] [P=..] [ARGS="--span START END", --verify]
	@"$(PY)" -m helpers.tools.cache $(if $(TASK),--task "$$TASK") $(if $(PROFILE),--profile "$$PROFILE") \
		--parameters "$$P" $(ARGS)

update: env  ## merge the template's news into your branch [FROM=origin, a git remote]
	@"$(PY)" -m helpers.tools.update "$${FROM:-origin}"

new-notebook: env  ## copy a notebook to one of your own: FROM=finetune NAME=my_ribbons
	@"$(PY)" -m helpers.tools.new_notebook "$${FROM:-finetune}" "$$NAME"

lint: env  ## check style and format
	@"$(PY)" -m ruff check . && "$(PY)" -m ruff format --check .

lock:  ## pin the newest versions in requirements.lock (torch and jsonschema keep their pins)
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && "$(PYTHON)" -m venv "$$folder/venv" \
	&& "$$folder/venv/bin/python" -m pip install -qq $$(grep -E '^(torch|jsonschema)==' requirements.lock) -e ".[dev]" \
	&& { sed '/^[^#]/,$$d' requirements.lock; "$$folder/venv/bin/python" -m pip freeze -qq --all --exclude pip \
		--exclude-editable | sed 's/+[a-z0-9.]*$$//'; } > "$$folder/lock" && cp "$$folder/lock" requirements.lock

clean:  ## remove .venv and the caches of this folder; runs, data and settings stay
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
	-@for section in filter.nbstripout diff.jupyternotebook merge.jupyternotebook; do \
		git config --local --remove-section $$section 2>/dev/null; done; true
