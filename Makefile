# The project's habits. `make demo` and `make test` do all the set-up on a fresh machine.

VENV   := .venv
BIN    := $(VENV)/bin
PYTHON ?= python3

.PHONY: demo test check runtime check-aarch64 check-vulkan clean

demo: runtime            ## measure, prune, convert, run and judge the bundled demo model
	$(BIN)/python -m mone_edge.demo.tour

test: runtime            ## all tests
	$(BIN)/python -m pytest

check: $(VENV)/.installed  ## formatting, lint, types: what CI checks before the tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

runtime: $(VENV)/.installed  ## the patched llama.cpp, built once and cached
	$(BIN)/mone-edge runtime build

check-aarch64: runtime   ## cross-compile for aarch64, and its tests under qemu
	$(BIN)/mone-edge runtime build --target aarch64-linux
	$(BIN)/mone-edge runtime build --target aarch64-linux-i8mm
	$(BIN)/python -m pytest -rs -s tests/runtime/test_aarch64.py

check-vulkan: runtime    ## the Vulkan build, and its tests on the first device (lavapipe will do)
	$(BIN)/mone-edge runtime build --backend vulkan
	$(BIN)/python -m pytest -rs -s tests/runtime/test_vulkan.py

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:                   ## the environment and what runs left here; the cache stays
	rm -rf $(VENV) demo-run .pytest_cache .mypy_cache .ruff_cache
