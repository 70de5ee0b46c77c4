"""How are Meta's own files (`params.json`, `tokenizer.model`, `consolidated.*.pth`) read and written?

`reader` opens a directory. `params` reads and writes the shape, `pickle_file` reads the weights without running any
code from them, and `writer` writes a directory. Read `reader` first.
"""
