"""Where do a model's files come from?

`locate` decides which model a name means. `hub`, `meta`, `pypi` and `cloud` each fetch from one kind of place, through
`http`, which resumes an interrupted fetch. Read `locate` first, then `http`.
"""
