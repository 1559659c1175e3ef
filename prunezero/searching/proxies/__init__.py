"""Proxies: how a search looks at candidates cheaply, on samples of what would be pruned."""
