"""How are GGUF files, as llama.cpp uses them, read and written?

`header` reads the table of contents, `reader` makes the shape and the weights of it, `tokenizer` the tokenizer and the
chat template. `writer` writes all of it. Read `header` first.
"""
