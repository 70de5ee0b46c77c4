"""How are Hugging Face's files (`config.json`, `tokenizer.json`, `*.safetensors`) read and written?

`reader` opens a directory. `safetensors_file` reads the weights, `tokenizer_json` the tokenizer, whose cutting of text
`tokenizer_steps` compares with the known patterns; `writer` writes all of it. Read `reader` first.
"""
