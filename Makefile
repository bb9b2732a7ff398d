PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
RUN    ?= runs/figures
MINUTES ?= 9
GPU_OUT ?= runs/gpu

export MIMREFINER_CACHE ?= $(CURDIR)/runs/cache

.PHONY: help demo reproduce test gpu figures publish browser docs lint lock clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 12

$(VENV)/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	touch $@

demo: $(VENV)/installed  ## half a minute: the packaged model, block by block
	$(BIN)/python -m mimrefiner demo

reproduce: $(VENV)/installed  ## execute all notebooks at preset tiny; everything lands under runs/tiny
	$(BIN)/python -m mimrefiner run --preset tiny --workers 2 --out runs/tiny

test: $(VENV)/installed  ## unit tests, golden tests and every notebook at preset smoke
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

gpu: $(VENV)/installed  ## on a machine with a GPU: is it right there, how fast is it; a table in runs/gpu
	$(BIN)/python -m experiments.gpu --minutes $(MINUTES) --out $(GPU_OUT)

figures: $(VENV)/installed  ## publish RUN (default: tiny with seeds 0,1,2, made if missing) into figures/
	test -f $(RUN)/claims.md || $(BIN)/python -m mimrefiner run --preset tiny --seeds 0,1,2 --workers 2 --out $(RUN)
	cp $(RUN)/figures/* $(RUN)/claims.csv $(RUN)/claims.md figures/
	mkdir -p figures/tables && cp $(RUN)/tables/* figures/tables/
	@echo "figures/ now shows $(RUN)"

publish: $(VENV)/installed  ## keep the executed notebooks of RUN in notebooks/executed/, without paths of this machine
	$(BIN)/python -m mimrefiner publish $(RUN)

browser: $(VENV)/installed  ## what the tests in a browser need beside a chromium; make test runs them then
	$(BIN)/python -m pip install --disable-pip-version-check -q -e ".[browser]"

docs: $(VENV)/installed  ## build the documentation site in runs/site and check its links
	$(BIN)/python -m pip install --disable-pip-version-check -q -e ".[docs]"
	$(BIN)/python -m mkdocs build --strict --quiet
	$(BIN)/python docs/check_links.py runs/site

lint: $(VENV)/installed  ## style checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lock:  ## write requirements.lock anew from pyproject.toml
	$(PYTHON) -m venv runs/lock-venv
	runs/lock-venv/bin/python -m pip install --disable-pip-version-check -q ".[dev]" setuptools
	runs/lock-venv/bin/python -m pip freeze --exclude mimrefiner --all | grep -v -E '^(pip|nvidia|cuda|triton)' | sed -E 's/\+cpu//; s/^(pexpect|ptyprocess)(==.*)/\1\2 ; sys_platform != "win32"/' > requirements.lock

clean:  ## remove the environment and all runs
	rm -rf $(VENV) runs
