"""Which shapes does a drawing have?

Each module has a block that draws one thing: `icicle` a tree, `dials` angles, `diagram` a network. The block computes
its geometry. `drawing` has its base class and the shapes, which `svg` and `sheet` paint without knowing what they mean.
"""
