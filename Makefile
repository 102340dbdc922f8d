# The words of this project. `make help` prints them; CI runs `lint` and `test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
OUT ?= build/bench
SCALE ?= full
# Rows of a small run are nothing to keep.
ROWS = $(if $(filter full,$(SCALE)),docs/measurements,build)
FUZZ ?= 100

.DEFAULT_GOAL := help
.PHONY: help install serve demo test faults torture clients fuzz report soak lint format docs stress bench-suite bench peers compare sanitize coverage clean

help: ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## Create .venv and install everything into it

$(VENV)/.installed: pyproject.toml CMakeLists.txt $(wildcard native/*)
	@echo "Installing into $(VENV); the first time takes a minute or two."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

serve: install ## Serve the embedded model on 127.0.0.1:8000 (more flags: ARGS="--port 9000")
	@$(BIN)/dormouse serve $(ARGS)

demo: install ## Five agents, a SIGKILL, a restart: what waking costs
	@$(BIN)/python -m benchmarks.demo $(ARGS)

test: install ## Run all tests
	@$(BIN)/python -m pytest $(ARGS)

faults: install ## Fail at every step on disk and cut the power there, in every way: minutes
	@$(BIN)/python -m pytest -q tests/crash/test_every_fault.py tests/crash/test_power_cuts.py --every --timeout 3600 $(ARGS)

torture: install ## Kill servers under load, 300 times, and write docs/measurements/torture.json: half an hour
	@$(BIN)/python -m tests.crash.torture --out docs/measurements/torture.json $(ARGS)

clients: install ## Claude Code, Codex and other clients against the server: minutes, and 800 MB of build/clients
	@$(BIN)/python -m tests.clients $(ARGS)

stress: install ## Floods, crowds, storms and sustained load at full scale; rows to docs/measurements (SCALE=small: three minutes)
	@$(BIN)/python -m pytest tests/stress --scale $(SCALE) --record $(ROWS)/stress.json $(ARGS)

fuzz: install ## The fuzz tests with a hundred times as many examples, drawn anew: about an hour (FUZZ=10 for minutes)
	@FUZZ=$(FUZZ) $(BIN)/python -m pytest -q tests/security -k fuzz --timeout 14400 $(ARGS)

lint: install ## Check style, types and generated pages
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m docs.generate --check

format: install ## Format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: install ## Generate the pages that come from the code
	@$(BIN)/python -m docs.generate

report: install ## Pages and charts from the rows of real runs (of the tests too: ARGS="--junit build/junit.xml")
	@$(BIN)/python -m docs.report $(ARGS)

bench: install ## Prefill, decode, wake and memory figures of this machine, as JSON in OUT
	@mkdir -p $(OUT)
	$(BIN)/dormouse bench prefill --json > $(OUT)/prefill.json
	$(BIN)/dormouse bench decode --json > $(OUT)/decode.json
	$(BIN)/dormouse bench wake --json > $(OUT)/wake.json
	$(BIN)/python -m benchmarks.memory > $(OUT)/memory.json

bench-suite: install ## Batching, resuming and memory as tests at full scale; rows to docs/measurements (SCALE=small: one minute)
	@$(BIN)/python -m pytest benchmarks/suite --scale $(SCALE) --record $(ROWS)/suite.json $(ARGS)

soak: install ## An hour of agents, restarts and crowds; fails when a promise is broken (shorter: ARGS="--minutes 3")
	@$(BIN)/python -m benchmarks.soak $(ARGS)

peers: install ## Install the servers that Dormouse is compared with, each below build/peers
	@$(BIN)/python -m benchmarks.compare.install $(ARGS)

compare: install ## Compare with the peers and write docs/benchmarks.md: 40 quiet minutes (after `make peers`)
	$(BIN)/python -m benchmarks.compare --out docs/measurements/compare

# With the environment's packages, but not its hooks: these would load its own module, not the sanitized one.
sanitize: install ## The kernel tests under address and undefined behaviour sanitizers
	@rm -rf build/sanitize/site
	@$(BIN)/python -m pip install --quiet --no-deps --target build/sanitize/site . \
		--config-settings=build-dir=build/sanitize/cmake --config-settings=cmake.define.DORMOUSE_SANITIZE=ON
	@LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		PYTHONPATH="$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
		$(PYTHON) -m pytest -q -o pythonpath="build/sanitize/site ." tests/native \
		tests/runtimes/torch/test_torch_quantized.py $(ARGS)

coverage: install ## Branch coverage of the tests; also to build/coverage.json
	@$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered --cov-report=json:build/coverage.json $(ARGS)

clean: ## Remove what was built
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
