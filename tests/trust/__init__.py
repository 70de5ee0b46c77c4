"""The long runs behind docs/reliability.md, a command each; CI runs them short."""
