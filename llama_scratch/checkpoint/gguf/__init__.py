"""How are GGUF files, as llama.cpp uses them, read and written?

`header` reads metadata and the table of tensors. From these, `reader` builds the shape and the weights, and `tokenizer`
the tokenizer and the chat template. `writer` writes all of it. Read `header` first.
"""
