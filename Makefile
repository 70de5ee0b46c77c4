# Each target sets up all that it needs. Another Python: make PYTHON=python3.12 run
PYTHON ?= python3

.PHONY: run test images clean

run:  ## start the session with the open model
	@$(PYTHON) tools/install.py .venv
	@.venv/bin/llama-scratch --quiet pull smollm2
	@.venv/bin/llama-scratch --model smollm2

test:  ## style, types and tests
	@$(PYTHON) tools/install.py .venv-test plot test
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/mypy --strict
	.venv-test/bin/pytest

images:  ## make the README's pictures from real runs
	@$(PYTHON) tools/install.py .venv-test plot test
	.venv-test/bin/python -m docs.make_images

clean:  ## remove the environments and what the tests fetched
	rm -rf .venv .venv-test .cache
