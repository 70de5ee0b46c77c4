"""Sections of results.md: the results of each benchmark and their bounds.

In each module `section` renders the recorded file of one benchmark, and another function returns its bounds. `layout`
has the shared tables and verdicts. Read `layout` first, then a short section such as `startup`, and finally
`figures`, `speed_bounds` and `speed`, which belong together.
"""
