# Everything a newcomer needs: `make demo` shows the system, `make test` proves it.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
OUT    ?= runs

.PHONY: rtsp-rig install demo test check bench experiment gpu-check clean

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; call: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/ekya-optimizer demo --out $(OUT)/demo

test: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks --benchmark-columns=median,iqr,rounds --benchmark-sort=name
	$(BIN)/python benchmarks/bench_timeline.py --growth

experiment: $(STAMP)
	$(BIN)/ekya-optimizer experiment examples/city.toml --policies timeline,milp,thief,uniform,none --out $(OUT)/experiment-city
	$(BIN)/ekya-optimizer experiment examples/street.toml --executors 1 --policies timeline,milp,thief,uniform,none --out $(OUT)/experiment-street

# Needs an NVIDIA GPU; changes none of its settings. PYTHON may name one that has the dependencies, without .venv.
gpu-check:
	@mkdir -p $(OUT)
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m executor.gpu_check --out $(OUT)/gpu-check.json

# RTSP cameras for tests and benchmarks/live_cameras.py, from Debian's packages (needs root).
rtsp-rig:
	apt-get install -y -q --no-install-recommends gstreamer1.0-rtsp gir1.2-gst-rtsp-server-1.0 \
	  gstreamer1.0-plugins-base gstreamer1.0-plugins-good gstreamer1.0-plugins-bad python3-gi

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
