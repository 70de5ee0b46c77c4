"""Where do a model's files come from?

`locate` decides which model a name means. `hub`, `meta`, `pypi` and `cloud` each download from one kind of source.
`http` resumes interrupted downloads for `hub` and `meta`. Read `locate` first, then `http`.
"""
