"""Updates: what becomes of the weights that stay, and masks that are improved before."""
