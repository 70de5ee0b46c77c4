"""Meta's own format: `params.json`, `tokenizer.model` and `consolidated.*.pth`.

`reader` opens a directory. `params` reads and writes the shape, `pickle_file` reads the weights without running any
code from them, and `writer` writes a directory. Read `reader` first.
"""
