"""How does a result look to a user, a screen reader, a browser or another program?

A view is a `page` of blocks, made by the module in `pages` that has the microscope module's name, and `to_terminal`,
`to_plain`, `to_html` and `to_png` give it a form. Read `page` first, then one module of `pages`, then `to_terminal`;
`answer`, `reports` and `lines` print what is not a page, and nothing here computes with a model.
"""
