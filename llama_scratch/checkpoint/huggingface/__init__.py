"""How are Hugging Face's files (`config.json`, `tokenizer.json`, `*.safetensors`) read and written?

`reader` opens a directory. `safetensors_file` reads the weights and `tokenizer_json` the tokenizer, whose
pre-tokenizer `tokenizer_steps` compares with the known patterns. `writer` writes all of it. Read `reader` first.
"""
