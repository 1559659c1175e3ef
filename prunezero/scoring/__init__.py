"""Criterion and tensors in, scores and masks out."""
