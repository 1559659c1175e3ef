"""Pruned models go out as they came in, with other numbers in the same places."""
