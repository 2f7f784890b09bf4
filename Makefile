# Everything a newcomer needs: make demo, make test. Only Python 3.11+ and make are expected.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LINKS := $(VENV)/typing

.PHONY: demo test test-all lint format bench clean

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

lint: $(READY)  ## style and types
	$(BIN)/ruff check .
	@mkdir -p $(LINKS) && ln -sfn $(CURDIR) $(LINKS)/edgec  # the checkout's folder may have any name; the package has one
	cd $(LINKS) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml \
		-m edgec -m edgec.cli -p edgec.compiler -p edgec.passes -p edgec.backends -p edgec.calib

clean:
	rm -rf $(VENV) build dist out *.egg-info .mypy_cache .ruff_cache
