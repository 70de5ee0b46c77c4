"""Hugging Face's format: `config.json`, `tokenizer.json` and `*.safetensors`.

`reader` opens a directory. `safetensors_file` reads the weights and `tokenizer_json` the tokenizer, whose
pre-tokenizer `tokenizer_steps` compares with the known patterns. `writer` writes all of it. Read `reader` first.
"""
