# Everything a newcomer needs: make demo, make test. Only Python 3.11+ and make are expected.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LINKS := $(VENV)/typing
TVM := $(VENV)/tvm
ARM := $(VENV)/aarch64
ARM_WHEELS := --no-deps --only-binary=:all: --python-version 3.11 --implementation cp --abi cp311 \
	$(addprefix --platform manylinux_2_,28_aarch64 27_aarch64 24_aarch64)

.PHONY: demo test test-tvm tvm lint aarch64 clean

$(READY): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip setuptools wheel
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $(READY)

demo: $(READY)  ## compile the bundled digits model for this machine and show the report
	$(BIN)/edgec compile examples/digits/digits.onnx -o out/digits.edgec --force \
		--calib examples/digits/calib --eval examples/digits/val --threads 1

test: $(READY)  ## the whole test suite
	$(BIN)/python -m pytest -c tests/pytest.ini --rootdir=tests tests

tvm: $(TVM)/.ready  ## an environment with TVM: one of its own, since the others' tests must not meet it

$(TVM)/.ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(TVM)
	$(TVM)/bin/pip install --quiet --disable-pip-version-check --upgrade pip setuptools wheel
	$(TVM)/bin/pip install --quiet --disable-pip-version-check --editable '.[dev,tvm]'
	touch $@

test-tvm: $(TVM)/.ready  ## the tests that want TVM; those for Arm run where `make aarch64` was
	$(TVM)/bin/python -m pytest -c tests/pytest.ini --rootdir=tests tests/test_tvm*.py

aarch64: $(ARM)/.ready  ## what runs modules for Arm here: TVM's runtime for aarch64; as root, Debian's tools

$(ARM)/.ready: $(TVM)/.ready
	[ "$$(id -u)" != 0 ] || \
		{ apt-get update -q && apt-get install -qy gcc-aarch64-linux-gnu g++-aarch64-linux-gnu qemu-user; }
	rm -rf $(ARM)
	$(TVM)/bin/pip download --quiet --disable-pip-version-check $(ARM_WHEELS) --dest $(ARM) \
		'apache-tvm==0.27.*' apache-tvm-ffi==0.1.14.post1
	cd $(ARM) && for wheel in *.whl; do $(CURDIR)/$(TVM)/bin/python -m zipfile -e $$wheel .; done
	rm -f $(ARM)/*.whl $(ARM)/tvm/lib/libtvm_compiler.so  # the compiler runs here, the modules there
	touch $@

lint: $(READY)  ## style and types
	$(BIN)/ruff check .
	@mkdir -p $(LINKS) && ln -sfn $(CURDIR) $(LINKS)/edgec  # the checkout's folder may have any name; the package has one
	cd $(LINKS) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml \
		-m edgec -m edgec.cli -p edgec.compiler -p edgec.passes -p edgec.backends -p edgec.calib

clean:
	rm -rf $(VENV) build dist out *.egg-info .mypy_cache .ruff_cache
