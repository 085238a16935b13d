## make demo    train a network with AutoClip, with a fixed threshold and without clipping; DEMO="--help" for options
## make test    everything: static checks, C tests, Python tests on both backends
## make cross   the C tests on big-endian, 32-bit and ARM processors and on Windows, emulated
## make oldest  the JAX, TensorFlow and Keras tests on the oldest versions that pyproject.toml allows
## make engines  the same training under DeepSpeed, FSDP, Accelerate, Lightning, the Trainer and Ray, against one process
## make trainers  a small training with each library that people train with, resumed in a new process; TRAINERS="--help"
## make coverage  that the tests reach every line and branch of the kernel, and 95 % of the lines of each package
## make soak    the long forms of the tests, with their figures: most of a day; SOAK="--help" for parts and options
## make docs    the site: these pages and a reference, in build/site/README.html; every warning is an error
## make bench   growth of the cost with the history, beside its rivals
## make format  lay out all sources
## make clean   remove what the others made
##
## Needed: python3 (3.11 or newer, with venv and headers) and a C compiler. Everything else comes into .venv.

PYTHON ?= python3
# Whatever may end up in the wheel, and the folders themselves, so that a deleted file counts as well.
SOURCES := $(shell find csrc autoclip_core adapters -not -path '*__pycache__*') pyproject.toml README.md
C_SOURCES := $(shell find csrc tests bench -name '*.[ch]' -o -name '*.[ch]pp')

export PATH := $(CURDIR)/.venv/bin:$(PATH)
ifndef SIDE_BY_SIDE
.NOTPARALLEL:
endif
.PHONY: help demo test cross oldest oldest-jax oldest-tensorflow engines trainers coverage soak docs bench format clean tools static
.PHONY: python python-adapters python-others python-numba
.PHONY: c-asan c-tsan c-release c-msan c-fuzz c-valgrind c-coverage c-aarch64 c-s390x c-i386 c-windows

help:
	@sed -n 's/^## \?//p' Makefile

# The installed package is what runs, never the source tree: no editable install, and python -P.
demo: .venv/demo
	python -P -m autoclip_torch.demo --out demo-output $(DEMO)

# Two at a time: first what says most at a glance, then the longest; what each says is printed when it ends.
test: tools .venv/test
	$(MAKE) SIDE_BY_SIDE=1 --jobs=2 --output-sync --keep-going \
	    static python-adapters python-others python-numba c-asan c-tsan c-release c-msan c-fuzz

# From Debian: qemu-user, and gcc-aarch64-linux-gnu, gcc-s390x-linux-gnu, gcc-i686-linux-gnu with their libc6-dev; wine,
# and gcc-mingw-w64-x86-64.
cross: c-aarch64 c-s390x c-i386 c-windows

# Each with the lower bounds of pyproject.toml in an environment of its own, for they want different versions of others.
oldest = $(shell sed -n '/^$(1) = /{s/.*[ ["]$(2)>=\([^"]*\)".*/\1/p}' pyproject.toml)
OLDEST_jax = jax==$(call oldest,jax,jax) optax==$(call oldest,jax,optax) equinox flatbuffers flax 'orbax-checkpoint<0.11.6'
OLDEST_tensorflow = tensorflow-cpu==$(call oldest,tensorflow,tensorflow) keras==$(call oldest,keras,keras) tensorboard
TESTS_jax = tests/adapters/test_jax*.py
TESTS_tensorflow = tests/adapters/test_tensorflow.py tests/adapters/test_keras.py

oldest: oldest-jax oldest-tensorflow

oldest-jax oldest-tensorflow: oldest-%:
	$(PYTHON) -m venv build/$@
	AUTOCLIP_REQUIRE_NATIVE=1 build/$@/bin/pip install '.[numba]' $(OLDEST_$*) hypothesis pytest scikit-learn
	AUTOCLIP_BACKEND=native build/$@/bin/python -P -m pytest $(TESTS_$*)

# Two and four ranks on this machine's CPU; ENGINES="deepspeed ray" for some of them.
engines:
	$(PYTHON) -m venv build/engines
	AUTOCLIP_REQUIRE_NATIVE=1 PIP_CONSTRAINT=constraints.txt DS_BUILD_OPS=0 \
	    build/engines/bin/pip install '.[lightning,transformers]' -r tests/engines/requirements.txt
	AUTOCLIP_BACKEND=native build/engines/bin/python -P tests/engines/run.py $(ENGINES)

# Makes an environment for each family; TRAINERS="torch" for one, TRAINERS="skorch fastai" for some of the libraries.
trainers:
	$(PYTHON) tests/trainers/run.py $(TRAINERS)

docs: .venv/docs
	python -P -m sphinx -q --fail-on-warning --keep-going -c .github/site -d build/doctrees . build/site

bench: .venv/bench
	AUTOCLIP_BACKEND=native python -m bench history
	AUTOCLIP_BACKEND=native python -m bench torch
	AUTOCLIP_BACKEND=native python -m bench jax

format: .venv/test
	ruff check --fix --exit-zero
	ruff format
	clang-format -i --style=file:csrc/.clang-format $(C_SOURCES)

clean:
	rm -rf .venv build demo-output

.venv/bin/python:
	$(PYTHON) -m venv .venv

# Constrained twice because newer pips read the second name, and it alone, for the environment of the build.
.venv/demo .venv/test .venv/bench .venv/docs: .venv/%: constraints.txt $(SOURCES) | .venv/bin/python
	AUTOCLIP_REQUIRE_NATIVE=1 PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
	    python -m pip install '.[$*]'
	touch $@

tools:
	@for tool in $$(sed '/^#/d; s/ .*//' .ci/tools); do \
	    command -v $$tool >/dev/null || { echo "absent, tests that need it are skipped: $$tool"; absent=1; }; \
	done; test -z "$$absent" -o -z "$$AUTOCLIP_DEMAND_ALL"

static: .venv/test
	ruff check
	ruff format --check
	clang-format --dry-run --Werror --style=file:csrc/.clang-format $(C_SOURCES)
	mypy

c-asan c-tsan c-release c-valgrind c-aarch64 c-s390x c-i386 c-windows: c-%: .venv/test
	cd csrc && cmake --preset $* && cmake --build --preset $* && ctest --preset $*

# From Debian: clang, libclang-rt-dev. Where libFuzzer is absent this says so, and fails where everything is demanded.
c-msan c-fuzz: c-%: .venv/test
	@if echo 'int LLVMFuzzerTestOneInput(void) { return 0; }' | clang -x c -fsanitize=fuzzer -o /dev/null - 2>/dev/null; \
	then cd csrc && cmake --preset $* && cmake --build --preset $* && ctest --preset $*; \
	else echo "absent, its tests are skipped: libFuzzer"; test -z "$$AUTOCLIP_DEMAND_ALL"; fi

# From Debian: gcovr.
coverage: c-coverage
	python tests/programs/c_coverage.py build/coverage
	python -P tests/programs/python_coverage.py

c-coverage: .venv/test
	find build/coverage -name '*.gcda' -delete 2>/dev/null || true
	cd csrc && cmake --preset coverage && cmake --build --preset coverage && ctest --preset coverage

# From Debian: valgrind, and what c-fuzz and coverage need.
soak: .venv/test
	AUTOCLIP_BACKEND=native python -P tests/programs/soak.py $(SOAK)

python: python-adapters python-others python-numba

python-adapters: .venv/test
	AUTOCLIP_BACKEND=native pytest tests/adapters

python-others: .venv/test
	AUTOCLIP_BACKEND=native pytest --ignore=tests/adapters

python-numba: .venv/test
	AUTOCLIP_BACKEND=numba pytest tests/core
