"""What can go: the linear maps of a model, found by structure."""
