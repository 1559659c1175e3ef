"""Models come in: from files, shards, hub ids and .gguf, each through the same checks."""
