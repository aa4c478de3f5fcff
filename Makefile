# Everything happens inside .venv; nothing outside this folder is changed.
#   make quickstart   set-up, then the whole road on the built-in starter model
#   make test         set-up, then lint, types and every test without the `long` and `gpu` markers
# Paths are relative, so a checkout may live under a path with spaces.

PYTHON ?=
WORKERS ?= 2
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-input --quiet --no-compile
# Bytecode on all cores: pip would write it on one. What is left out is compiled when first imported.
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '/(tests?|testing|transformers/models)/' .venv/lib || true
SETUP := pyproject.toml requirements.lock tools/install_torch.py

.PHONY: quickstart setup setup-dev test test-long support-table claims fault-tools test-gpu lint types format lock clean
.DELETE_ON_ERROR:

quickstart: setup
	$(BIN)/charkha quickstart

setup: .venv/.ready
setup-dev: .venv/.ready-dev

$(BIN)/pip:
	PYTHON="$(PYTHON)" sh tools/make_venv.sh .venv

# The lock holds every package but torch, with hashes; torch is chosen for the machine.
.venv/.ready: $(SETUP) | $(BIN)/pip
	$(INSTALL) --require-hashes --no-deps -r requirements.lock
	$(BIN)/python tools/install_torch.py
	$(INSTALL) --no-deps --no-build-isolation --editable .
	@$(COMPILE)
	@touch $@

.venv/.ready-dev: .venv/.ready requirements-dev.lock
	$(INSTALL) --compile --require-hashes --no-deps -r requirements-dev.lock
	@touch $@

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup-dev
	$(BIN)/mypy

test: lint types
	$(BIN)/python -m pytest -n $(WORKERS) -m "not long and not gpu"

# A real UPS daemon, a clock that jumps and a systemd user manager, from Debian or Ubuntu. Their tests are skipped with
# the reason where these cannot be installed.
FAULT_TOOLS := nut-server libfaketime systemd dbus-daemon
fault-tools:
	@dpkg -s $(FAULT_TOOLS) >/dev/null 2>&1 || \
		(apt-get update -qq && apt-get install -y -qq --no-install-recommends $(FAULT_TOOLS)) || true

test-long: setup-dev fault-tools
	$(BIN)/python -m pytest -n $(WORKERS) -m "long and not gpu"

# Tries every architecture x method x quantization x packing x attention and writes docs/architectures.md from it.
support-table: setup-dev
	rm -rf build/cells && mkdir -p build/cells
	$(BIN)/python -m pytest -n $(WORKERS) -m long tests/matrix --record-cells build/cells
	$(BIN)/python tools/support_table.py build/cells

# Asks the planner about well-known claims and writes docs/claims.md.
claims: setup-dev
	$(BIN)/python tools/claims.py

test-gpu: setup-dev
	$(BIN)/python -m pytest -m gpu

format: setup-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: setup
	$(BIN)/python tools/lock.py

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache src/charkha.egg-info
	find src tests tools -type d -name __pycache__ -exec rm -rf {} +
