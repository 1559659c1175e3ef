"""Recipes, and the one loop that turns scores into a smaller model."""
