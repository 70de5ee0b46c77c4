"""The microscope: the network's internals between a prompt and the next token.

Each module answers one question about a text and returns frozen dataclasses. `tokens`, `surprisal` and `tree` look at
predictions; `lens`, `attention`, `attribution` and `neurons` at activations; `interventions`, `patching` and `effect`
at a modified network. `execution` steps through `model.py`. Read `inspection` first: it is the Python interface to most
of them. Then read `activations` and `parts`, which the other modules build on, and the module for your question.
"""
