"""What test modules share: models, servers, terminals, texts, and a second implementation to compare with."""

from __future__ import annotations

from pathlib import Path

# The folder of the repository, for tests that start programs in it or read its files.
ROOT = Path(__file__).parent.parent.parent
