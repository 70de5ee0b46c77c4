"""How fast and how accurate is this package, beside llama.cpp and others?

Each command measures one thing, records it in a .json file beside it, and `report` renders all of them as results.md,
with a module of `sections` per table. Read `startup` for a short example, then `compare`, which measures all engines
(`entries`, `workers`, `engines`) on the same model (`make_checkpoint`, `files`), and last `report`.
"""
