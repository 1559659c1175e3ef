"""Text: its sources, its splits by document, and the windows cut from it."""
