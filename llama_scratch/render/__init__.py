"""Results → what a person or a program reads. Pure: no model and no input, only values of `results`."""
