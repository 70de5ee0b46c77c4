"""GGUF files, as llama.cpp uses them.

`reader` opens a file, `header` reads its table of contents, `writer` writes both.
"""
