"""The session: turns typed lines into answers, on a terminal or in a pipe.

Read `state` first, which defines everything a session stores, and then `session`. After that, follow a line through
`loop` (`batch` if it comes from a pipe), `dispatch`, `answering` or `commands`, and `transitions`.

The other modules support these:

- `editor`, `live`, `keyboard`, `interrupts` and `history` read input.
- `loading` loads the model at startup, and `conversation` keeps the chat.
- `screen` and `growing` display views. `offers` manages the tokens that Enter adds to the text.
- `session_file`, `recording`, `saved_model`, `replay` and `user_files` save, restore and replay sessions.
"""
