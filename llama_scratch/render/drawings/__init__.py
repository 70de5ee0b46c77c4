"""Drawings: blocks of a page that consist of shapes.

Each module has one kind of drawing: `icicle` a tree, `dials` angles, `diagram` a network. A drawing computes its
geometry. `drawing` has the base class and the shapes, which `svg` and `painting` paint for web pages and PNG files.
"""
