"""How it goes: restoring dense weights, biases, permuted channels, sparse kernels."""
