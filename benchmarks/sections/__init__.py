"""Sections of results.md: the results of each benchmark and their bounds.

In each module, `section` renders the .json file of one benchmark, and another function returns its bounds. `layout` has
the shared tables and verdicts. Read `layout` first, then a short section such as `startup`. `figures`, `speed_bounds`
and `speed` belong together.
"""
