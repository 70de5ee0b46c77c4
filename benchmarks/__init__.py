"""Benchmarks of speed and accuracy against llama.cpp and other engines.

Each command measures one thing and records it in a .json file in this folder. `report` renders all of them as
results.md, with one module of `sections` per section. Read `startup` for a short example, then `compare`, which
measures all engines (`entries`, `workers`, `engines`) on the same model (`make_checkpoint`, `files`), and finally
`report`.
"""
