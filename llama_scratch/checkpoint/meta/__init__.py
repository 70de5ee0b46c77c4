"""Meta's own files: `params.json`, `tokenizer.model`, `consolidated.*.pth`.

`reader` opens a directory, `pickle_file` reads the weights without running any code from them, `writer` writes both.
"""
