"""Hugging Face's files: `config.json`, `tokenizer.json`, `*.safetensors`.

`reader` opens a directory; `tokenizer_json` and `safetensors_file` read its larger files, `writer` writes them.
"""
