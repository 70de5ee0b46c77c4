"""Operating system: files, memory, threads, processes and signals.

`small_files` reads untrusted files, `atomic_files` writes files atomically, `mapped_files` detects changes of
memory-mapped files, `hashing` computes checksums and `folders` locates the user's folders. `memory`, `jobs`,
`processes` and `crash_handler` deal with limits, threads, child processes and signals. `template_process` runs
untrusted chat templates in `template_sandbox`. Read `small_files` and `atomic_files` first.
"""
