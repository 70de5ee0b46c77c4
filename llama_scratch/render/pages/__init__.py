"""Pages for the results of the microscope: tables, heat maps and sentences.

Each module makes a `Page` from the results of the microscope module of the same name; `answer` makes one from a
prediction. The modules do not import torch, so that a session starts without it. `render.display` registers them by the
class of the result. Read `answer` first, then `lens` for a heat map and `tree` for a tree.
"""
