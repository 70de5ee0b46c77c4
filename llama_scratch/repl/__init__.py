"""The session: how a typed line becomes an answer, on a terminal or in a pipe.

Read `state` first, which holds everything a session knows, and then `session`. After that, follow a line through
`loop` (`batch` if it comes from a pipe), `dispatch`, `answering` or `commands`, and `transitions`.

The other modules support these: `editor`, `live`, `keyboard`, `interrupts` and `history` read input, `loading` loads
the model at startup, `conversation` keeps the chat, `offers` and `screen` present answers, and `session_file`,
`recording`, `saved_model`, `replay` and `user_files` save and restore sessions.
"""
