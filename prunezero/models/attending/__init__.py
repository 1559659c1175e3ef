"""What attention remembers while a model runs: looked at, chosen from, and left out."""
