# make demo    train, move between devices, kill, compare; writes demo-report.json and .html
# make test    lint, types, room order and all quick tests
# make judge-torch    torch's own suites of operations, modules and optimizers on a custom device
# make soak    each long proof in full
# make test-vendors   what needs a heavy package: Triton's compilers (1 GB on disk), SYCL with Intel's runtime (1.6 GB), AMD's hiprtc, Level Zero, promtool
# make bench   times and ratios; ends 1 on a miss
# make gpu-check [PYTHON=python3] [WHEELS=folder] [REPORTS=folder]   all that needs a GPU
# make setup   ./.venv with the project installed; the others call it

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-vendors judge-torch soak bench gpu-check lint audit lock clean

BIN := .venv/bin
READY := .venv/.ready
VENDORS := $(CURDIR)/build/vendors
PROMTOOL := $(VENDORS)/debian/usr/bin/promtool
NATIVE := $(wildcard src/drivetrain/hal/*.c src/drivetrain/hal/*.h)

help:
	@sed -n 's/^# make/make/p' Makefile

$(READY): pyproject.toml setup.py constraints.txt tools/setup.sh $(NATIVE)
	@PYTHON="$(PYTHON)" tools/setup.sh

setup: $(READY)

demo: setup
	@$(BIN)/drivetrain demo

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

# Lint goes first, so that the last line is pytest's own summary. A file's tests stay together.
test: lint
	@$(BIN)/python -m pytest -n 2 --dist loadfile

# Folders of their own: in .venv torch would find Triton and use it, and Debian's package prometheus
# starts a server. SYCL's wheels have libraries that pip leaves out with --target.
test-vendors: setup
	@tools/debian.sh libamdhip64-5 libamdhip64-dev libhiprtc-builtins5 libze1 libze-dev
	@test -x $(PROMTOOL) || (mkdir -p $(VENDORS)/debian && cd $(VENDORS)/debian && \
	    apt-get download -qq prometheus 2>/dev/null && dpkg -x prometheus_*.deb . && rm prometheus_*.deb) || \
	    echo "setup: no promtool here, and Debian's package prometheus cannot be had" >&2
	@test -d $(VENDORS)/triton || $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --no-deps --target $(VENDORS) triton==3.9.0
	@DRIVETRAIN_TEST_TRITON=$(VENDORS) $(BIN)/python -m pytest tests/hal/language/test_triton.py \
	    tests/hal/language/test_triton_of_drivers.py \
	    tests/hal/drivers/test_hip_header.py tests/hal/drivers/test_level_zero_header.py \
	    tests/hal/telemetry/test_level_zero_metrics.py tests/hal/telemetry/test_rocprofiler.py -rs
	@$(BIN)/python -m pytest tests/hal/kernels/test_compiled_for_amd.py -m "soak or not soak" -rs
	@PATH="$(dir $(PROMTOOL)):$$PATH" $(BIN)/python -m pytest tests/runtime/test_alerts.py \
	    tests/runtime/test_exporter.py -rs
	@test -e $(VENDORS)/sycl/.ready || { $(BIN)/python -m pip install --quiet \
	    --disable-pip-version-check --ignore-installed --prefix $(VENDORS)/sycl dpctl==0.22.1 \
	    intel-opencl-rt==2026.2.0 intel-cmplr-lib-rt==2026.2.0 && touch $(VENDORS)/sycl/.ready; }
	@DRIVETRAIN_TEST_SYCL=$(VENDORS)/sycl $(BIN)/python -m pytest tests/hal/drivers/test_sycl.py \
	    tests/runtime/test_chip_jobs.py -k sycl -rs
	@DRIVETRAIN_SYCL_LIBRARY="$$(echo $(VENDORS)/sycl/lib/python*/site-packages/dpctl/libDPCTLSyclInterface.so)" \
	    $(BIN)/python -m pytest tests/hal/test_execution_plans.py -rs

judge-torch: setup
	@$(BIN)/python tools/judge_torch.py

soak: setup
	@$(BIN)/python -m pytest -m soak --timeout 3600
	@$(BIN)/python -m pytest -m "hypothesis and not soak and not gpu" --hypothesis-profile soak --timeout 3600

bench: setup
	@$(BIN)/python -m benchmarks

# Takes the interpreter and the torch that are there; never touches .venv or the interpreter.
gpu-check:
	@$(or $(PYTHON),python3) tools/gpu_check.py $(if $(WHEELS),--wheels "$(WHEELS)") \
	    $(if $(REPORTS),--reports "$(REPORTS)")

# Known vulnerabilities of the pinned packages. Never fails a build that has no network.
audit: setup
	@$(BIN)/pip-audit --requirement requirements.lock --no-deps --disable-pip \
	    || echo "audit: findings above, or no network; not counted as a failure"

lock: setup
	@$(BIN)/python tools/lock.py

clean:
	rm -rf .venv build src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	rm -f src/drivetrain/hal/*.so demo-report.json demo-report.html
	find src tests examples demos benchmarks tools -name __pycache__ -type d -prune -exec rm -rf {} +
