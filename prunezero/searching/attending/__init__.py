"""Search for criteria of keys in a cache, by two objectives that disagree."""
