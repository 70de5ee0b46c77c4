"""Long reliability runs for docs/reliability.md, one command each; CI runs short versions."""
