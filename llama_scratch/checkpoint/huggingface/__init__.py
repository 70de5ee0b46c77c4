"""Hugging Face's format: `config.json`, `tokenizer.json` and `*.safetensors`.

`reader` opens a directory. `safetensors_file` reads the headers of weight files. `tokenizer_json` reads the tokenizer,
and `tokenizer_steps` compares its pre-tokenizer with the known patterns. `writer` writes a directory. Read `reader`
first.
"""
