"""Training that wins back some of what pruning cost, with every zero held."""
