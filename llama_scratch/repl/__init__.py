"""What happens to a line that is typed, from the key press to the answer, on a terminal and in a pipe?

Read `state` first, which holds everything that a session knows, then `session`, and then the way of a line: `loop` (or
`batch`, for a pipe), `dispatch`, `answering` or `commands`, and `transitions`. The rest serves one of these: `editor`,
`live`, `keyboard`, `interrupts` and `history` the typing, `loading` the start, `conversation` the chat, `offers` and
`screen` the answer, and `session_file`, `recording`, `saved_model`, `replay` and `user_files` what is saved.
"""
