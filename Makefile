# Each target does its own set-up in .venv; all that a machine needs is Python 3.11 to 3.13 and the package registries.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo check test test-slow test-kernels test-backends lint lock clean

# Tests of one file share what they build; tracing graphs keeps one core busy.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# Files that have the marker `check`; to add one, mark it. The others are not even imported.
QUICK := $(shell grep --files-with-matches "^pytestmark = pytest.mark.check" tests/test_*.py)
MATHS := $(patsubst %,tests/test_%.py,boxes nms losses mining anchors targets detections properties subnets backends)

KERNELS := $(patsubst %,tests/test_%.py,boxes nms losses mining anchors targets detections subnets optimizers backbone \
	model train_step export export_elsewhere)

demo: .venv/installed
	@echo "== Training on generated shapes with configs/shapes.json (at most 8 minutes on two free CPU cores)"
	$(BIN)/python train.py --config configs/shapes.json
	@echo "== Detecting in some test images with the exported model"
	$(BIN)/python -m retinanet_keras detect --model runs/shapes/export \
		data/shapes/images/test_000000.jpg data/shapes/images/test_000001.jpg data/shapes/images/test_000002.jpg \
		--to runs/shapes/detected

# While writing: the maths, the configuration and the rules for data, without any training.
check: lint
	@echo "== Quick tests, about a minute (all: make test)"
	$(BIN)/python -m pytest -m "check and not slow" $(PARALLEL) $(QUICK)

# For a change to be accepted: what users do, in the commonest variants.
test: .venv/installed
	@echo "== Tests (the longer ones: make test-slow)"
	$(BIN)/python -m pytest $(PARALLEL)

# Before a release: whole trainings, kills, replicas under XLA, every released model, and the rarer variants of the rest.
test-slow: .venv/installed
	@echo "== The longer tests, before a release"
	$(BIN)/python -m pytest -m slow

test-backends: .venv-backends/installed
	@for backend in tensorflow jax torch; do \
		echo "== The maths, the model and fit on $$backend"; \
		KERAS_BACKEND=$$backend .venv-backends/bin/python -m pytest -m "not slow" $(PARALLEL) $(MATHS) || exit 1; \
	done

# The numerics, the backbone, the export and the train step with either set of TensorFlow's kernels for CPUs.
test-kernels: .venv/installed
	@for onednn in 0 1; do \
		echo "== Tests with TF_ENABLE_ONEDNN_OPTS=$$onednn"; \
		export TF_ENABLE_ONEDNN_OPTS=$$onednn; \
		$(BIN)/python -m pytest $(PARALLEL) $(KERNELS) || exit 1; \
		$(BIN)/python -m pytest -m slow "tests/test_backbone.py::test_a_step_of_resnext[False]" || exit 1; \
	done

lint: .venv/installed
	@echo "== Lint"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

lock: .venv/installed
	@echo "== Pinning the newest versions that requirements.txt allows"
	$(BIN)/python -m pip install --quiet "uv>=0.5"
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra dev --extra onnx --upgrade --no-emit-index-url \
		--custom-compile-command "make lock" pyproject.toml --output-file requirements.lock

clean:
	rm -rf .venv .venv-backends build *.egg-info

.venv/installed: requirements.lock
.venv-backends/installed: requirements.lock requirements-backends.txt

%/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else \
		f"Python 3.11, 3.12 or 3.13 is needed, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	@echo "== Installing into $* (TensorFlow is large: some minutes the first time)"
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --disable-pip-version-check $(patsubst %,--requirement %,$(filter requirements%,$^))
	$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@
