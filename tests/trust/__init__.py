"""Long reliability runs for docs/reliability.md; CI runs short versions."""
