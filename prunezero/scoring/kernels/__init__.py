"""Triton kernels: their text, made from a formula, the files they live in, and their launches."""
