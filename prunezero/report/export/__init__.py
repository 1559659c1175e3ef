"""Exports: a recipe as one page of torch, as a Triton kernel, as a saved model with its card."""
