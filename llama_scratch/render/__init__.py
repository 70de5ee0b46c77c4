"""How does a result look to a user, a screen reader, a browser or another program?

A view is a `page` of blocks. Each module of `pages` builds the page for the microscope module of the same name, and
`to_terminal`, `to_plain`, `to_html` and `to_png` render it. `answer`, `reports` and `lines` print everything that is
not a page. Read `page` first, then one module of `pages`, then `to_terminal`. Nothing here runs a model.
"""
