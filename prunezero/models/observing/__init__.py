"""What a layer sees: hooks, walks over blocks, gradients, sums over calibration text."""
