"""The textbook: how Llama predicts the next token, one chapter per part of the network.

Each chapter is a Markdown file with three kinds of code blocks:

    python               a cell. A `text` block after it is what it prints
    python source=NAME   lines of this package, by the name that `/source` takes
    console              lines to type in a session

`cells.py` runs the cells. Tests compare what they print with the text, and the source with the package.
"""
