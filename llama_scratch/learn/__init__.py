"""Exercises: write the network yourself, one function per chapter, and have each checked.

Begin with `exercises.py`, which lists them. `check.py` runs a reader's file in a process of its own, `comparison.py`
compares its results with the package's, and `mistakes.py` knows the common mistakes by their results.
"""
