# Each target sets up all that it needs. Another Python: make PYTHON=python3.12 run
PYTHON ?= python3

.PHONY: run test slow instruction-sets images benchmark quality formats lock audit minimums clean

run:  ## start the session with the open model
	@$(PYTHON) tools/install.py .venv
	@.venv/bin/llama-scratch --quiet pull smollm2
	@.venv/bin/llama-scratch --model smollm2

test:  ## style, types and tests, but for the slow ones
	@$(PYTHON) tools/install.py .venv-test plot test
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/mypy --strict
	$(PYTEST) -m "not slow"

slow:  ## the tests that compare at length: real text against other programs, benchmarks, memory, sanitizers
	@$(PYTHON) tools/install.py .venv-test plot test
	$(PYTEST) -m slow

PYTEST = OMP_NUM_THREADS=1 .venv-test/bin/pytest -n auto --maxprocesses 4 --dist loadfile
ONLY_AVX2 = ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2

instruction-sets:  ## the tests as a CPU without AVX-512 runs them; then the kernels in plain C++
	@$(PYTHON) tools/install.py .venv-test plot test
	$(ONLY_AVX2) TEST_KERNELS=avx2 $(PYTEST)
	TEST_KERNELS=plain $(PYTEST) tests/precision/test_kernels.py tests/precision/test_linear.py \
		tests/precision/test_panels.py tests/inference/test_long_attention.py tests/inference/test_prompt_lookup.py

images:  ## make the README's pictures from real runs
	@$(PYTHON) tools/install.py .venv-test plot test
	.venv-test/bin/python -m docs.make_images

benchmark: .venv-benchmark  ## measure us and the peers in one run, with IK=PATH ik_llama.cpp too; writes benchmarks/results.md
	.venv-benchmark/bin/python -m benchmarks.compare $(if $(IK),--ik $(IK))

quality: .venv-benchmark  ## measure how far each precision is from fp32, ours and llama.cpp's
	.venv-benchmark/bin/python -m benchmarks.quality
	.venv-benchmark/bin/python -m benchmarks.quality --rotate

formats: .venv-benchmark  ## measure every form of a model's files: loading, and llama.cpp's tokens and logits
	.venv-benchmark/bin/python -m benchmarks.loading
	.venv-benchmark/bin/python -m benchmarks.formats

.PHONY: .venv-benchmark
.venv-benchmark:  # llama.cpp is built from source, for this machine
	@CMAKE_ARGS="-DGGML_NATIVE=ON" $(PYTHON) tools/install.py .venv-benchmark benchmark
	@.venv-benchmark/bin/llama-scratch --quiet pull smollm2

lock: .venv-tools  ## choose the newest versions for tests again; writes tools/lock.txt
	echo torch | .venv-tools/bin/uv pip compile --quiet --upgrade --universal --generate-hashes --no-emit-index-url \
		--python-version 3.11 --extra plot --extra hub --extra test --excludes - \
		--custom-compile-command "make lock" --output-file tools/lock.txt pyproject.toml

audit: .venv-tools  ## look up the locked packages, and torch, among the known vulnerabilities
	.venv-tools/bin/pip-audit --strict --disable-pip --requirement tools/lock.txt
	grep -o 'torch>=[0-9.]*' pyproject.toml | sed 's/>=/==/' | \
		.venv-tools/bin/pip-audit --strict --no-deps --disable-pip --requirement /dev/stdin

minimums: .venv-tools  ## the tests with the oldest versions that pyproject.toml allows
	.venv-tools/bin/uv pip compile --quiet --resolution lowest-direct --no-emit-index-url --python-version 3.11 \
		--extra plot --extra hub --extra test --output-file .venv-tools/minimums.txt pyproject.toml
	$(PYTHON) -m venv --clear .venv-minimums
	.venv-minimums/bin/pip install --quiet --requirement .venv-tools/minimums.txt
	.venv-minimums/bin/pip install --quiet --no-deps --editable .
	OMP_NUM_THREADS=1 .venv-minimums/bin/pytest -n auto --maxprocesses 4 --dist loadfile

.venv-tools:
	$(PYTHON) -m venv .venv-tools
	.venv-tools/bin/pip install --quiet uv pip-audit

clean:  ## remove the environments and what the tests fetched
	rm -rf .venv .venv-test .venv-benchmark .venv-tools .venv-minimums .cache
