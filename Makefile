# Everything a developer does with clipseed. `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo
JOBS ?= 2
# A virtual environment is not on the PATH by itself.
TELL = @command -v clipseed > /dev/null || printf '\n%s\n' \
  "clipseed is at $(BIN)/clipseed; to call it by its name in this shell: . $(BIN)/activate" >&2

.PHONY: help install demo test test-fast lint format bench bench-gpu results results-weclip results-prompts results-bridge toy-clip toy-sam toy-report clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/clipseed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("clipseed needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.dev: $(BIN)/clipseed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[crf]' \
	  || echo "pydensecrf2 could not be built (no C++ compiler?): the tests that compare with it are skipped"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[ray]' \
	  || echo "Ray could not be installed: the tests of --engine ray are skipped"
	@touch $@

install: $(BIN)/clipseed  ## make .venv and install clipseed into it
	$(TELL)

demo: $(BIN)/clipseed  ## run the main job on the built-in toy world, offline
	$(BIN)/clipseed demo --out $(DEMO)
	$(TELL)

test: $(VENV)/.dev  ## run all tests, JOBS=2 at a time
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

test-fast: $(VENV)/.dev  ## run the tests that take no more than a few seconds each
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -m 'not slow'

lint: $(VENV)/.dev  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(BIN)/clipseed  ## measure speed and memory beside the bare encoder (docs/performance.md)
	$(BIN)/python tools/bench.py
	$(BIN)/python tools/bench_refine.py
	$(BIN)/python tools/bench_sam.py
	$(BIN)/python tools/bench_scale.py --count 2000
	$(BIN)/python tools/bench_busy.py

bench-gpu: $(BIN)/clipseed  ## check and measure everything on a CUDA GPU, in eight minutes, into gpu.json and docs/performance.md
	rm -f gpu.json; $(BIN)/python tools/bench_gpu.py --out gpu.json; status=$$?; \
	  test ! -e gpu.json || $(BIN)/python tools/bench_gpu.py --render gpu.json; exit $$status

results: $(BIN)/clipseed  ## measure what every step is worth (docs/results.md; PHOTOS=DEVKIT or COCO=DIR SEGMENTS=PATH: on photographs)
	$(BIN)/python tools/results.py $(if $(PHOTOS),--photos $(PHOTOS)) $(if $(COCO),--coco $(COCO) --segments $(SEGMENTS))

results-weclip: $(BIN)/clipseed  ## what WeCLIP learns on the toy world, into docs/results-weclip.md (90 minutes)
	$(BIN)/python tools/results_weclip.py

results-prompts: $(BIN)/clipseed  ## what learned prompts are worth on the toy world, into docs/results-prompts.md
	$(BIN)/python tools/results_prompts.py

results-bridge: $(VENV)/.dev  ## what language adds to light networks, into docs/results-bridge.md (six CPU-hours)
	$(BIN)/python tools/results_bridge.py $(OPTIONS)

toy-clip: $(BIN)/clipseed  ## train the tiny CLIP again (hours; docs/toy.md)
	$(BIN)/python -m tools.toy.train_clip --out runs/toy-clip

toy-sam: $(BIN)/clipseed  ## train the tiny SAM again (an hour; docs/toy.md)
	$(BIN)/python -m tools.toy.train_sam --out runs/toy-sam

toy-report: $(BIN)/clipseed  ## measure the tiny CLIP and the tiny SAM on the held-out scenes
	$(BIN)/python -m tools.toy.measure
	$(BIN)/python -m tools.toy.measure_sam

clean:  ## remove caches and outputs, keep .venv
	rm -rf build dist $(DEMO) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
