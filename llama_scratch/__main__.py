"""`python -m llama_scratch`."""

from llama_scratch.cli import main

main()
