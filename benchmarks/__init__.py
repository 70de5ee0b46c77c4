"""Benchmarks of speed and accuracy against llama.cpp and other engines.

Each command measures one thing and records the results in a .json file in this folder. `report` renders all .json files
as results.md; each module of `sections` renders one section.

`startup` is a short example. `compare` measures all engines (`entries`, `workers`, `engines`) on the same model
(`make_checkpoint`, `files`).
"""
