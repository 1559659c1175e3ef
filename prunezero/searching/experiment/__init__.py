"""One experiment: what is looked for, on which models and text, and against which baselines."""
