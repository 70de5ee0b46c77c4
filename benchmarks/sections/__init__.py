"""What did a benchmark measure, and does it meet its bounds?

Each module is one section of results.md: `section` renders what one benchmark recorded, and its bounds are beside it;
`layout` has the tables and the verdicts that all share. Read `layout` first, then a short section such as `startup`,
and last `figures`, `speed_bounds` and `speed`, which belong together.
"""
