"""Inference: predict and generate with a loaded model.

Start with `loaded_model`, which encodes prompts and predicts. Then read `engine`, which runs the network and reuses the
KV cache of the last prompt, and `generation`, which continues a text with drafts from `prompt_lookup`. `fused_layers`,
`long_attention` and `cuda_graph` are faster implementations of `model.py`. `loading` builds the network of a
checkpoint, `prompt_text` encodes prompts, `prompt_warnings` checks them, and `speed` runs benchmarks.
"""
