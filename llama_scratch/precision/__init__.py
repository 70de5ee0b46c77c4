"""How is a weight stored, and how is it multiplied?

`network` puts the file's weights into a network in the precision that was asked for. `linear` holds what replaces
torch's linear layers, `quantize` and `calibration` make 8 and 4 bits, `weight_cache` keeps them between runs, and
`kernels.cpp` multiplies them. Read `network` first, then `linear`, then `cpp/`.
"""
