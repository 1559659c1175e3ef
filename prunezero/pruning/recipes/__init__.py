"""Recipes: their words and numbers, YAML documents, and published results to compare with."""
