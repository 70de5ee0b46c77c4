"""GGUF, the file format of llama.cpp.

`header` reads the metadata and the table of tensors. From these, `reader` builds the dimensions and the weights, and
`tokenizer` builds the tokenizer and the chat template. `writer` writes GGUF files. Read `header` first.
"""
