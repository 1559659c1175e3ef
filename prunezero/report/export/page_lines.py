"""The lines of an exported page, by the features and sums that its formula looks at.

Features are computed by the torch text of their rows; what a sum adds is the engine's arithmetic,
and a test runs both.
"""

from __future__ import annotations

import re

from prunezero.formula.features import FEATURES

# Names that a feature's text reads, and how a page makes them.
_MADE = {"upper": "inverse_factor(stats, DAMPING)"}
# Functions of `page_parts.py` that make them.
HELPERS = {"upper": ("inverse_factor", "inverse_of_upper")}
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


def feature_lines(name: str) -> list[str]:
    """The lines that give a feature its value, from `weight` and the `stats` of a layer."""
    row = FEATURES[name]
    line = row.line
    for read in {*row.inputs} - {"weight", *_MADE}:
        line = re.sub(rf"\b{read}\b", f'stats["{read}"]', line)
    return [
        *(f"{made} = {_MADE[made]}" for made in row.inputs if made in _MADE),
        f"{name} = {line}",
    ]
