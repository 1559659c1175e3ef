"""What a formula may look at: one row per feature, by its name.

The rows stand in a file for each family of what may go: `features_of_weights.py`,
`features_of_units.py`, `features_of_experts.py`, `features_of_attention.py`. What a row says is
told in `feature_row.py`.
"""

from __future__ import annotations

from prunezero.formula.feature_row import Feature
from prunezero.formula.features_of_attention import ATTENTION_FEATURES
from prunezero.formula.features_of_experts import EXPERT_FEATURES
from prunezero.formula.features_of_units import UNIT_FEATURES
from prunezero.formula.features_of_weights import WEIGHT_FEATURES

_ROWS = (*WEIGHT_FEATURES, *UNIT_FEATURES, *EXPERT_FEATURES, *ATTENTION_FEATURES)

FEATURES: dict[str, Feature] = {row.name: row for row in _ROWS}


def features_of_domain(name: str) -> tuple[str, ...]:
    """Names of the features that say something of a table, in the order of the vocabulary."""
    return tuple(row.name for row in _ROWS if name in row.domains)
