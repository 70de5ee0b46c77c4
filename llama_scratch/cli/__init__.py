"""What does a command line ask for?

`app` reads the options and calls the library; `config_file` holds the user's defaults. Read `app` first.
"""
