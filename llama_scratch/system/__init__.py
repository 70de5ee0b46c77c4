"""What does the program need of the operating system, apart from any model?

`small_files` reads untrusted files, `atomic_files` writes whole ones, `mapped_files` watches the mapped ones, `hashing`
computes checksums and `folders` finds the user's. `memory`, `jobs`, `processes` and `crash_handler` deal with limits,
threads, child processes and signals; `template_process` runs untrusted chat templates in `template_sandbox`.
Read `small_files` and `atomic_files` first.
"""
