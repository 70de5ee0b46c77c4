"""GGUF, the file format of llama.cpp.

`header` reads metadata and the table of tensors. From these, `reader` builds the shape and the weights, and `tokenizer`
the tokenizer and the chat template. `writer` writes all of it. Read `header` first.
"""
