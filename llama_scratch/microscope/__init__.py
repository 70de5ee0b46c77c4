"""Looking inside: what a model says of each token of a text, of other continuations, of other texts."""
