"""The lines of an exported page, by the features and sums that its formula looks at.

They are the engine's own arithmetic, without the engine; a test runs both on every feature.
"""

# How a feature follows from the weight and the sums: the same arithmetic as in the engine.
FEATURE_LINES = {
    "W": "weight.float()",
    "R1": "weight.abs().sum(1, keepdim=True, dtype=torch.float64).float()",
    "C1": "weight.abs().sum(0, keepdim=True, dtype=torch.float64).float()",
    "R2": "torch.linalg.vector_norm(weight, dim=1, keepdim=True, dtype=torch.float64).float()",
    "C2": "torch.linalg.vector_norm(weight, dim=0, keepdim=True, dtype=torch.float64).float()",
    "X": '(stats["input_square_sum"] / stats["sequences"]).sqrt().float()[None]',
    "X_ms": '(stats["input_square_sum"] / stats["tokens"]).float()[None]',
    "X_rms": '(stats["input_square_sum"] / stats["tokens"]).sqrt().float()[None]',
    "X_mean": '(stats["input_sum"] / stats["tokens"]).float()[None]',
    "X_var": "variance.clamp(min=0.0).float()[None]",
    "Y": '(stats["output_square_sum"] / stats["sequences"]).sqrt().float()[:, None]',
    "G": 'stats["gradient_square_sum"].sqrt()',
    "G1": 'stats["gradient_absolute_sum"]',
    "F": 'stats["token_gradient_square_sum"].sqrt()',
    "D": '(stats["output_gradient_square_sum"] / stats["tokens"]).sqrt().float()[:, None]',
    "H": '(stats["gram"].diagonal() / stats["sequences"])[None]',
    "V": "upper.square().sum(0).float()[None]",
    "U": "upper.diagonal().float()[None]",
}
# Lines that must come before a feature's own.
_FACTOR = ("upper = inverse_factor(stats, DAMPING)",)
PREPARATION = {
    "V": _FACTOR,
    "U": _FACTOR,
    "X_var": (
        'mean = stats["input_sum"] / stats["tokens"]',
        'variance = stats["input_square_sum"] / stats["tokens"] - mean.square()',
    ),
}
# Functions of `page_parts.py` that these lines call, by the feature that needs them.
HELPERS = {name: ("inverse_factor", "inverse_of_upper") for name in ("V", "U")}
# What one sequence adds to a sum, by the values that it is made from.
SUM_LINES = {
    "inputs": {
        "input_sum": "x.sum(0, dtype=torch.float64)",
        "input_square_sum": "x.double().square().sum(0)",
        "gram": "x.float().T @ x.float()",
    },
    "outputs": {"output_square_sum": "y.double().square().sum(0)"},
    "output gradients": {
        "output_gradient_square_sum": "d.double().square().sum(0)",
        "token_gradient_square_sum": "d.float().square().T @ x.float().square()",
    },
    "gradient": {
        "gradient_square_sum": "g.float().square()",
        "gradient_absolute_sum": "g.float().abs()",
    },
}
