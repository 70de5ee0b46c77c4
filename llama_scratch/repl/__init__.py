"""The interactive session, and its twin for pipes."""
