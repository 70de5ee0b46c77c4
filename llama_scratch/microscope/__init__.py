"""What happens inside the network between a prompt and its next token?

Each module answers one question about a text with plain, frozen results: tokens, surprisal and tree from predictions;
lens, attention, attribution and neurons from activations; interventions, patching and effect from a changed network;
execution from a walk through `model.py`. Read `inspection` first, which offers most of them to a program, then
`activations` and `parts`, on which the others rest, then the module of your question.
"""
