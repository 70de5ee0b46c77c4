# Each target installs everything it needs. To use another Python: make PYTHON=python3.12 run
PYTHON ?= python3

.PHONY: run test slow instruction-sets images benchmark quality formats lock audit minimums clean

run:  ## start an interactive session with SmolLM2
	@$(PYTHON) tools/install.py .venv
	@.venv/bin/llama-scratch --quiet pull smollm2
	@.venv/bin/llama-scratch --model smollm2

test:  ## run linters, type checks and all tests except the slow ones
	@$(PYTHON) tools/install.py .venv-test plot test
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/mypy --strict
	$(PYTEST) -m "not slow"

slow:  ## run the slow tests: comparisons on real text, benchmarks, memory, sanitizers
	@$(PYTHON) tools/install.py .venv-test plot test
	$(PYTEST) -m slow

PYTEST = OMP_NUM_THREADS=1 .venv-test/bin/pytest -n auto --maxprocesses 4 --dist loadfile
ONLY_AVX2 = ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2

instruction-sets:  ## run the tests limited to AVX2, then the kernel tests in portable C++
	@$(PYTHON) tools/install.py .venv-test plot test
	$(ONLY_AVX2) TEST_KERNELS=avx2 $(PYTEST)
	TEST_KERNELS=plain $(PYTEST) tests/precision/test_kernels.py tests/precision/test_linear.py \
		tests/precision/test_panels.py tests/inference/test_long_attention.py tests/inference/test_prompt_lookup.py

images:  ## generate the pictures of the README from real runs
	@$(PYTHON) tools/install.py .venv-test plot test
	.venv-test/bin/python -m docs.make_images

benchmark: .venv-benchmark  ## compare speed with other engines (IK=PATH adds ik_llama.cpp); writes benchmarks/results.md
	.venv-benchmark/bin/python -m benchmarks.compare $(if $(IK),--ik $(IK))

quality: .venv-benchmark  ## measure the accuracy of each precision relative to fp32, ours and llama.cpp's
	.venv-benchmark/bin/python -m benchmarks.quality
	.venv-benchmark/bin/python -m benchmarks.quality --rotate

formats: .venv-benchmark  ## measure load times of all file formats, and agreement with llama.cpp
	.venv-benchmark/bin/python -m benchmarks.loading
	.venv-benchmark/bin/python -m benchmarks.formats

.PHONY: .venv-benchmark
.venv-benchmark:  # builds llama.cpp from source for this machine
	@CMAKE_ARGS="-DGGML_NATIVE=ON" $(PYTHON) tools/install.py .venv-benchmark benchmark
	@.venv-benchmark/bin/llama-scratch --quiet pull smollm2

lock: .venv-tools  ## update the locked test dependencies; writes tools/lock.txt
	echo torch | .venv-tools/bin/uv pip compile --quiet --upgrade --universal --generate-hashes --no-emit-index-url \
		--python-version 3.11 --extra plot --extra hub --extra test --excludes - \
		--custom-compile-command "make lock" --output-file tools/lock.txt pyproject.toml

audit: .venv-tools  ## check the locked packages and torch for known vulnerabilities
	.venv-tools/bin/pip-audit --strict --disable-pip --requirement tools/lock.txt
	grep -o 'torch>=[0-9.]*' pyproject.toml | sed 's/>=/==/' | \
		.venv-tools/bin/pip-audit --strict --no-deps --disable-pip --requirement /dev/stdin

minimums: .venv-tools  ## run the tests with the oldest versions that pyproject.toml allows
	.venv-tools/bin/uv pip compile --quiet --resolution lowest-direct --no-emit-index-url --python-version 3.11 \
		--extra plot --extra hub --extra test --output-file .venv-tools/minimums.txt pyproject.toml
	$(PYTHON) -m venv --clear .venv-minimums
	.venv-minimums/bin/pip install --quiet --requirement .venv-tools/minimums.txt
	.venv-minimums/bin/pip install --quiet --no-deps --editable .
	OMP_NUM_THREADS=1 .venv-minimums/bin/pytest -n auto --maxprocesses 4 --dist loadfile

.venv-tools:
	$(PYTHON) -m venv .venv-tools
	.venv-tools/bin/pip install --quiet uv pip-audit

clean:  ## remove the environments and the files downloaded by tests
	rm -rf .venv .venv-test .venv-benchmark .venv-tools .venv-minimums .cache
