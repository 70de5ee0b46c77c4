"""Meta's own format: `params.json`, `tokenizer.model` and `consolidated.*.pth`.

`reader` opens a directory. `params` reads and writes the dimensions, `pickle_file` reads the weights without running
code from the file, and `writer` writes a directory. Read `reader` first.
"""
