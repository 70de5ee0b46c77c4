"""How does a network answer quickly, and exactly?

`engine` runs the network over token ids and keeps what it computed of the last prompt; `prompt_lookup` guesses tokens
that it then verifies in one pass. `fused_layers`, `long_attention` and `cuda_graph` compute the same as `model.py` in
fewer steps; `speed` measures all of it. Read `engine` first.
"""
