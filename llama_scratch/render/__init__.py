"""Rendering: results as terminal output, plain text, web pages, pictures and JSON.

A view is a `page` of blocks. Each module of `pages` builds the page for the microscope module of the same name, and
`to_terminal`, `to_plain`, `to_html` and `to_png` render it. `answer`, `reports` and `lines` format everything that
is not a page. Read `page` first, then one module of `pages`, then `to_terminal`. Nothing here runs a model.
"""
