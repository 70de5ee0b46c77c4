"""How does a loaded model answer, quickly and exactly?

Read `loaded_model` first, which encodes prompts and predicts, then `engine`, which runs the network and reuses the KV
cache of the last prompt, and `generation`, which continues a text with the drafts of `prompt_lookup`. `fused_layers`,
`long_attention` and `cuda_graph` compute the same as `model.py` in fewer calls; `loading` builds the network of a
checkpoint, `prompt_text` and `prompt_warnings` look at the prompt, and `speed` measures all of it.
"""
